"""Holes: one word taken out of each of some stories. Is the word found, and its length if that is not given?

    python tests/tools/holes.py --words 48 [--before 150 --after 48] [--checkpoint runs/NAME_TIME]

Around each word stand so many bytes before and after it; the best of 16 fillings is taken, as `generate --prompt
"... {2-12} ..."` does, of all lengths from 2 to 12 together. Beside it: one greedy filling of the right length.
`tests` does not run this file.
"""

import argparse
import dataclasses
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main


def measure():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--before", type=int, default=150)
    parser.add_argument("--after", type=int, default=48)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    model, config, _ = main.load_checkpoint(arguments.checkpoint or main.newest_run())
    text = main.open_datasets(config)[1].bytes.tobytes().decode(errors="replace")
    b, a = arguments.before, arguments.after
    words = [match.span() for match in re.finditer(r"\b[A-Za-z]{2,12}\b", text[: -a - 12]) if match.start() > b]
    greedy = dataclasses.replace(config, temperature=0.0)
    counts = dict.fromkeys(["right length", "right word", "right word of given length", "the same, greedy"], 0)
    for start, stop in random.Random(0).sample(words, arguments.words):
        before, word, after = text[start - b : start], text[start:stop], text[stop : stop + a]
        truth, known = [*(before + word + after).encode()], main.holes_to_masks(f"{before}{{{len(word)}}}{after}")
        best = lambda texts, config, n: main.best_fillings(model, texts, config, main.Progress(), n)[0]
        chosen = best(main.holes_to_masks(before + "{2-12}" + after), config, 16)
        counts["right length"] += len(chosen) == len(truth)
        counts["right word"] += chosen == truth
        counts["right word of given length"] += best(known, config, 16) == truth
        counts["the same, greedy"] += best(known, greedy, 1) == truth
    print(", ".join(f"{figure} {count / arguments.words:.2f}" for figure, count in counts.items()))


if __name__ == "__main__":
    measure()
