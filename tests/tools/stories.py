"""Is a text the beginning of a story that the starter corpus' grammar can tell? Of samples of a run:

    python tests/tools/stories.py --checkpoint runs/NAME_TIME --samples 64 --bytes 126 [flags of generate]

An exactly valid text keeps to one name, one pronoun, one home; with free names each may change at every use, so the
difference is what does not hang together. `tests` checks the checker, but does not run this file.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main


def follow(text, at, pieces, chosen, are_names_free):
    """Yields (place in text, choices) for each way in which text goes on from `at` by these pieces of the grammar,
    literals and {names}; the place is beyond the end of the text if that ends on the way."""
    if not pieces or at > len(text):
        yield at, chosen
        return
    first, *rest = pieces
    if not first.startswith("{"):
        shared = len(commonprefix(first, text[at:]))
        follow.longest = max(follow.longest, at + shared)
        if shared == len(first):
            yield from follow(text, at + shared, rest, chosen, are_names_free)
        elif at + shared == len(text):
            yield len(text) + 1, chosen
        return
    name = first[1:-1].lower()
    names, alternatives = next(rule for rule in main.Story.rules if name in rule[0].split("/"))
    names = names.split("/")
    choices = [dict(zip(names, alternative.split("/"), strict=True)) for alternative in alternatives.split(" | ")]
    if name in chosen and not are_names_free:
        choices = [chosen]
    for choice in choices:
        value = choice[name].capitalize() if first[1].isupper() else choice[name]
        for place, known in follow(text, at, re.findall(r"\{\w+\}|[^{]+", value), chosen | choice, are_names_free):
            yield from follow(text, place, rest, known, are_names_free)


def commonprefix(a, b):
    number = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:number]


def judge(text, are_names_free=False):
    """(whether text, a str, begins a story or tells it whole, characters before the first slip, whether it is whole).
    What follows the empty line after a story is another story."""
    story, end, rest = text.partition("\n\n")
    follow.longest = 0
    places = {place for place, _ in follow(story, 0, ["{story}"], {}, are_names_free)}
    is_whole = bool(end) and len(story) in places
    is_valid = is_whole if end else len(story) + 1 in places or len(story) in places
    if is_whole and rest:
        is_rest_valid, longest, _ = judge(rest, are_names_free)
        return is_rest_valid, len(story) + 2 + longest, True
    return is_valid, len(text) if is_valid else follow.longest, is_whole


def check_run():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=126)
    parser.add_argument("--show", type=int, default=3)
    main.add_config_flags(parser, [*main.SAMPLING, "seed", "device"])
    flags = vars(parser.parse_args())
    checkpoint, samples, num_bytes, show = (flags.pop(name) for name in ("checkpoint", "samples", "bytes", "show"))
    model, config, _ = main.load_checkpoint(checkpoint or main.newest_run(), flags.get("device", "auto"))
    config = dataclasses.replace(config, **flags)
    written = main.run_conditional_diffusion_inference(model, ["\n\n"] * samples, num_bytes, config)
    training_text = Path(config.train_data_file).read_text(encoding="utf-8")
    results = {free: [judge(text[2:], free) for text in written] for free in (False, True)}
    stories = [
        text[2:].partition("\n\n")[0]
        for text, (_, _, is_whole) in zip(written, results[False], strict=True)
        if is_whole
    ]
    for text in written[:show]:
        print(repr(text))
    print(f"of {samples} samples of {num_bytes} bytes after an empty line, seeds from {config.seed} on:")
    for free, name in ((False, "exactly valid"), (True, "valid with free names")):
        share = sum(is_valid for is_valid, _, _ in results[free]) / samples
        kept = sum(longest for _, longest, _ in results[free]) / sum(len(text) - 2 for text in written)
        print(f"{name:<22} {share:.2f}, characters before the first slip {kept:.2f}")
    complete = sum("\n\n" in text[2:] for text in written) / samples
    copied = sum(story in training_text for story in stories)
    print(f"complete {complete:.2f}, complete and valid to the end {len(stories) / samples:.2f}")
    print(f"of those {len(stories)} whole stories {copied} stand in the training text")


if __name__ == "__main__":
    check_run()
