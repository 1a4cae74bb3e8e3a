"""Holes of unknown length: one word taken out of each of some stories. Is its length found, and the word itself?

    python tests/tools/holes.py --words 16 [--checkpoint runs/NAME_TIME]

Around each word stand 150 bytes before it and 48 after it; lengths of 2 to 12 are tried, as `generate --prompt
"... {2-12} ..."` does, which takes some five seconds a word on two cores. Bytes are taken greedily. `tests` does not
run this file.
"""

import argparse
import dataclasses
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main

BEFORE, AFTER = 150, 48


def measure():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    model, config, _ = main.load_checkpoint(arguments.checkpoint or main.newest_run())
    config = dataclasses.replace(config, temperature=0.0)
    text = main.open_datasets(config)[1].bytes.tobytes().decode(errors="replace")
    words = [
        match.span() for match in re.finditer(r"\b[A-Za-z]{2,12}\b", text[: -AFTER - 12]) if match.start() > BEFORE
    ]
    lengths = chosen_right = known_right = 0
    for start, stop in random.Random(0).sample(words, arguments.words):
        before, word, after = text[start - BEFORE : start], text[start:stop], text[stop : stop + AFTER]
        chosen = main.choose_length_of_hole(model, before + "{2-12}" + after, [], config)
        known = before + f"{{{len(word)}}}" + after
        fill = lambda prompt: main.run_conditional_diffusion_inference(model, main.holes_to_masks(prompt), 0, config)
        lengths += chosen == known
        chosen_right += fill(chosen) == before + word + after
        known_right += fill(known) == before + word + after
    shares = (f"{count / arguments.words:.2f}" for count in (lengths, chosen_right, known_right))
    print("right length {}, right word {}, right word if its length is given {}".format(*shares))


if __name__ == "__main__":
    measure()
