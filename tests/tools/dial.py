"""The price of diffusion over the dial from autoregression to LLaDA: the same minutes for each length of the blocks.

    python tests/tools/dial.py --minutes 5 --blocks 1 2 4 8 16 32 0 [--train_data_file train.txt ...]

Trains one run after the other in this folder and prints a row of a table for each: the bound (exact for blocks of one
byte, never both in a column), the exact likelihood from left to right, stories that the starter corpus' grammar can
tell, bytes restored in 20-byte holes and the speed of writing 256 bytes. `tests` does not run this file.
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

TITLES = "blocks of | steps | bound | exact, left to right | infilling | valid at 126 bytes | free names | bytes/s"


def measure(run_dir, num_chunks=64):
    """The cells of a run's row."""
    model, config, state = main.load_checkpoint(run_dir / "latest.pt")
    _, dataset = main.open_datasets(config)
    n, length = config.block_length, config.max_length
    bound = main.with_error(*main.estimate_nelbo(model, dataset))
    starts = torch.arange(num_chunks).numpy() * (len(dataset.bytes) - length) // num_chunks
    x0 = dataset.read(starts)
    exact = main.exact_likelihood(model, x0[: num_chunks // 2]).mean(dim=1)
    exact = main.with_error(*main.mean_over_bytes(exact, torch.ones_like(exact)))
    infilling, start = "", (length - 20) // 2
    if model.sees_whole_texts:
        holes, last = [[*x[:start], *[main.MASK] * 20, *x[start + 20 :]] for x in x0.tolist()], []
        greedy = dataclasses.replace(config, temperature=0.0)
        main.run_conditional_diffusion_inference(model, holes, 0, greedy, on_step=lambda x: last.append(x.clone()))
        is_right = (last[-1] == x0)[:, start : start + 20].double().mean(dim=1)
        infilling = main.with_error(*main.mean_over_bytes(is_right, torch.ones_like(is_right)))
    if not n:  # a model of whole texts writes better in LLaDA's semi-autoregressive blocks than all over
        config = dataclasses.replace(config, block_length=16)
    samples = main.run_conditional_diffusion_inference(model, ["\n\n"] * num_chunks, 126, config)
    shares = ["", ""]
    if main.STARTER_LINE in Path(config.train_data_file).read_bytes()[:1000]:
        shares = [f"{sum(judge(s[2:], free)[0] for s in samples) / num_chunks:.2f}" for free in (False, True)]
    seconds = []
    for seed in range(5):
        started = time.perf_counter()
        main.run_conditional_diffusion_inference(model, "\n\n", 256, config, seed=seed)
        seconds.append(time.perf_counter() - started)
    speed = f"{256 / statistics.median(seconds):,.0f}"
    bounds = ["", exact] if n == 1 else [bound, exact]  # exact: of the same chunks for all
    return [n or length, f"{state['step']:,}", *bounds, infilling, *shares, speed]


def dial():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 0])
    arguments, flags = parser.parse_known_args()
    print(f"| {TITLES} |\n|{'---|' * 8}", flush=True)
    for n in arguments.blocks:
        before = set(Path("runs").glob("*"))
        training = [f"--block_length={n}", f"--max_minutes={arguments.minutes}", "--max_steps=1000000"]
        training += ["--num_samples=0", "--validate_every=1000000", "--checkpoint_every=1000000", f"--name=blocks_{n}"]
        sys.stdout, console = sys.stderr, sys.stdout
        try:
            if main.main([*training, *flags]):
                sys.exit(1)
            (run_dir,) = set(Path("runs").glob("*")) - before
            cells = measure(run_dir)
        finally:
            sys.stdout = console
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    dial()
