"""Holes in stories of the starter corpus' grammar: does the model heed what stands on the right?

    python tests/tools/holes.py --cases 60 --words 48 [--checkpoint runs/NAME_TIME]

Three probes in fresh stories. The word to fill is the first of two places, so that what decides stands only after it:
a thing or a name that comes again, an animal whose home follows. Beside each: how often the most probable word of the
grammar that has this length would be right without reading on. Then one word taken out of each of some validation
texts, with 150 bytes before and 48 after it: found if its length is given, greedily and drawn, and by `generate`'s way
for an unknown length, {2-12}: its length, and the word. `tests` does not run this file.
"""

import argparse
import dataclasses
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main


def probes(kind, cases, seed=1):
    """[(text, start, stop)] of fresh stories: the first place of a thing, name or animal."""
    choose, found = random.Random(seed).choice, []
    while len(found) < cases:
        story = main.Story(choose)
        text = "\n\n" + story["story"] + "\n\n"
        if kind == "animal" and "lived in the" not in text:
            continue
        word = story[kind]
        start = text.index(word)
        if kind == "animal" or word in text[start + len(word) :]:
            found.append((text, start, start + len(word)))
    return found


def fill(model, config, cases, temperature):
    """The bytes that were written into the hole of each case."""
    settings, words = dataclasses.replace(config, temperature=temperature), []
    for number, (text, start, stop) in enumerate(cases):
        hole = [*text[:start].encode(), *[main.MASK] * (stop - start), *text[stop:].encode()]
        written = main.run_conditional_diffusion_inference(model, hole, 0, settings, seed=number)
        words.append(written[start:stop])
    return words


def measure():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    model, config, _ = main.load_checkpoint(arguments.checkpoint or main.newest_run())
    for kind in ("thing", "name", "animal") if arguments.cases else ():
        cases = probes(kind, arguments.cases)
        truth = [text[start:stop] for text, start, stop in cases]
        by_length = {length: Counter(w for w in truth if len(w) == length) for length in map(len, truth)}
        chance = sum(max(counter.values()) for counter in by_length.values()) / len(truth)
        shares = [
            sum(map(str.__eq__, fill(model, config, cases, t), truth)) / len(truth) for t in (0.0, config.temperature)
        ]
        print(f"{kind:<7} greedy {shares[0]:.2f}, drawn {shares[1]:.2f} (chance {chance:.2f})", flush=True)
    if not arguments.words:
        return
    text, b, a = main.open_datasets(config)[1].bytes.tobytes().decode(errors="replace"), 150, 48
    spans = [match.span() for match in re.finditer(r"\b[A-Za-z]{2,12}\b", text[: -a - 12]) if match.start() > b]
    chosen = random.Random(0).sample(spans, arguments.words)
    cases = [(text[start - b : stop + a], b, b + stop - start) for start, stop in chosen]
    truth = [case[start:stop] for case, start, stop in cases]
    for name, temperature in (("greedy", 0.0), ("drawn", config.temperature)):
        share = sum(map(str.__eq__, fill(model, config, cases, temperature), truth)) / len(truth)
        print(f"words of given length, {name}: {share:.2f}", flush=True)
    lengths = words = 0
    started = time.perf_counter()
    for case, start, stop in cases:
        texts = main.holes_to_masks(case[:start] + "{2-12}" + case[stop:])
        best = main.best_fillings(model, texts, config, 1)[0]
        lengths += len(best) == len(case.encode())
        words += bytes(best) == case.encode()
    seconds = (time.perf_counter() - started) / len(cases)
    found = f"length {lengths / len(cases):.2f}, word {words / len(cases):.2f}"
    print(f"words of unknown length: {found}, {seconds:.1f} s each")


if __name__ == "__main__":
    measure()
