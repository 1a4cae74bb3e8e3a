"""What the length of the blocks buys, from autoregression (1) to LLaDA (0): the same minutes of training for each.

    python tests/tools/dial.py --minutes 5 --blocks 1 2 4 8 16 0 [--train_data_file train.txt ...]
    python tests/tools/dial.py --runs runs/NAME_TIME ...            only measure these runs

Trains one run after the other in this folder and prints a row of a table for each: the bound, the exact likelihoods on
32 chunks (written by blocks from left to right; by the next byte) and of the next byte on the whole validation text,
20-byte holes (restored greedily, and what the text on their right is worth in bits per byte), and the share of 100
whole stories that the starter corpus' grammar can tell. A second table: the speed of writing 256 bytes with each length
of drafts, all runs and lengths in turn. `tests` does not run this file.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from stories import judge

import main

TITLES = "blocks of | steps | bound | by blocks | next byte | next byte, whole text | holes | right is worth | stories"


def mean(values):
    return main.with_error(*main.mean_over_bytes(values.double(), torch.ones(len(values), dtype=torch.double)))


def settings_of(config):
    """A model of whole texts writes better in LLaDA's semi-autoregressive blocks than all over."""
    return config if config.block_length else dataclasses.replace(config, block_length=16)


def measure(run_dir, num_chunks=64, num_stories=100):
    """The cells of a run's row."""
    model, config, state = main.load_checkpoint(run_dir / "latest.pt")
    _, dataset = main.open_datasets(config)
    n, length = config.block_length, config.max_length
    starts = torch.arange(num_chunks).numpy() * (len(dataset.bytes) - length) // num_chunks
    x0, cells = dataset.read(starts), [n or length, f"{state['step']:,}"]
    cells.append("" if n == 1 else main.with_error(*main.estimate_nelbo(model, dataset)))
    cells.append("" if n == 1 else mean(main.exact_likelihood(model, x0[:32], "left_to_right").mean(dim=1)))
    left = main.exact_likelihood(model, x0 if n else x0[:32])
    cells.append(mean(left[:32].mean(dim=1)) if n else "")
    cells.append(
        main.with_error(*main.judge(model, dataset)["exact likelihood" if n == 1 else "next byte"]) if n else ""
    )
    if model.fills_holes:
        place, last = torch.arange(length), []
        is_hole = (place >= (length - 20) // 2) & (place < (length - 20) // 2 + 20)
        greedy, holes = dataclasses.replace(config, temperature=0.0), x0.masked_fill(is_hole, main.MASK).tolist()
        main.run_conditional_diffusion_inference(model, holes, 0, greedy, on_step=lambda x: last.append(x.clone()))
        cells.append(mean((last[-1] == x0)[:, is_hole].double().mean(dim=1)))
        both = main.exact_likelihood(model, x0[: len(left)], is_hole=is_hole)
        cells.append(mean((left - both)[:, is_hole].mean(dim=1)))
    else:
        cells += ["", ""]
    if main.STARTER_LINE in Path(config.train_data_file).read_bytes()[:1000]:
        options = {"until": "\n\n"}
        texts = main.run_conditional_diffusion_inference(
            model, ["\n\n"] * num_stories, length - 2, settings_of(config), **options
        )
        return [*cells, f"{sum(judge(text[2:])[2] for text in texts) / num_stories:.2f}"]
    return [*cells, ""]


def speeds(run_dirs, lengths, num_bytes=256, repeats=5):
    """Rows (blocks of, drafts of, bytes per pass, bytes/s): medians over seeds, all in turn."""
    measured = {}
    models = [main.load_checkpoint(run_dir / "latest.pt")[:2] for run_dir in run_dirs]
    for seed in range(repeats + 1):
        for model, config in models:
            for n in lengths if config.block_length > 1 else [settings_of(config).block_length]:
                settings, passes = dataclasses.replace(config, block_length=n), []
                started = time.perf_counter()
                main.run_conditional_diffusion_inference(
                    model, "\n\n", num_bytes, settings, seed=seed, on_step=lambda _, passes=passes: passes.append(1)
                )
                seconds = time.perf_counter() - started
                if seed:  # the first one warms up
                    key = config.block_length or config.max_length, n
                    measured.setdefault(key, []).append((num_bytes / (len(passes) - 1), num_bytes / seconds))
    return [(*key, *(statistics.median(column) for column in zip(*rows))) for key, rows in measured.items()]


def dial():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 0])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--runs", type=Path, nargs="+")
    arguments, flags = parser.parse_known_args()
    print(f"| {TITLES} |\n|{'---|' * 9}", flush=True)
    run_dirs = list(arguments.runs or [])
    for n in [] if arguments.runs else arguments.blocks:
        before = set(Path("runs").glob("*"))
        training = [f"--block_length={n}", f"--max_minutes={arguments.minutes}", "--max_steps=1000000"]
        training += ["--num_samples=0", "--validate_every=1000000", "--checkpoint_every=1000000", f"--name=blocks_{n}"]
        sys.stdout, console = sys.stderr, sys.stdout
        try:
            if main.main([*training, *flags]):
                sys.exit(1)
        finally:
            sys.stdout = console
        run_dirs += set(Path("runs").glob("*")) - before
        print("| " + " | ".join(map(str, measure(run_dirs[-1]))) + " |", flush=True)
    for run_dir in arguments.runs or []:
        print("| " + " | ".join(map(str, measure(run_dir))) + f" | {run_dir}", flush=True)
    print("\n| blocks of | drafts of | bytes per pass | bytes/s |\n|---|---|---|---|")
    for n, drafts, per_pass, per_second in speeds(run_dirs, arguments.drafts):
        print(f"| {n} | {drafts} | {per_pass:.2f} | {per_second:,.0f} |", flush=True)


if __name__ == "__main__":
    dial()
