"""The README's two curves, from TensorBoard's logs (`pip install matplotlib`, which nothing else here needs):

    python tests/figures.py --curve "diffusion (bound)=runs/diffusion5_*" \\
        --curve "autoregressive twin (exact)=runs/autoregressive5_*" --other "nanoGPT (exact)=runs/nanogpt_*" \\
        --other "nanoDLM (bound)=runs/nanodlm_*" --other "tiny-diffusion (bound)=runs/tiny_diffusion_*"

of runs of five minutes (README, The price of diffusion), of `main.py` with `--name diffusion5_s0` and so on, the others
of `tests/baselines.py`. Each curve is a label and the runs, one or several seeds, that it is the mean of; the pictures
are written to `.github`: curves.svg, bits per byte over minutes of training, and mask_ratio.svg, what the first curve's
runs got right in the end.
"""

import argparse
import glob
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLORS = "#2da44e", "#8250df", "#bf8700", "#0969da", "#cf222e"


def read_run(folder):
    """{tag: [points]} of a run, each with its step, its value and the minutes since the run's first point."""
    log = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    if "train/loss" not in log.Tags()["scalars"]:
        sys.exit(f"error: {folder}: holds no logs of a training")
    started = log.Scalars("train/loss")[0].wall_time
    scalars = {tag: log.Scalars(tag) for tag in log.Tags()["scalars"]}
    return {tag: [(e.step, (e.wall_time - started) / 60, e.value) for e in events] for tag, events in scalars.items()}


def axes(title, x, y):
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def draw_curves(curves, others):
    figure, axis = axes("Bits per byte over time", "minutes of training", "bits per byte")
    for (label, runs), color in zip((curves | others).items(), COLORS, strict=False):
        for tag, style, text in (("val", "-", "validation text"), ("train", ":", "training text")):
            if tag == "train" and label in others:
                continue
            points = [np.array(run[f"{tag}/bits_per_byte"]) for run in runs]
            length = min(map(len, points))  # the mean ends with the run of the fewest points
            _, minutes, values = np.mean([p[:length] for p in points], axis=0).T
            axis.plot(minutes, values, style, color=color, label=f"{label}, {text}")
            for p in points if len(points) > 1 else []:
                axis.plot(p[:, 1], p[:, 2], style, color=color, alpha=0.25, linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def draw_mask_ratios(runs):
    figure, axis = axes("Accuracy by mask ratio", "bytes of a text that are masked, %", "accuracy")
    prefix = "validation_accuracy_by_mask_ratio/"
    tags = sorted(tag for tag in runs[0] if tag.startswith(prefix))  # .../to_010_percent and so on
    if not tags:
        sys.exit("error: the first curve's runs have no accuracy by mask ratio; give diffusion runs first")
    ends = [int(tag.split("_")[-2]) for tag in tags]
    accuracies = np.mean([[run[tag][-1][2] for tag in tags] for run in runs], axis=0)
    axis.bar(np.array(ends) - 5, accuracies, width=9, color=COLORS[0])
    for end, accuracy in zip(ends, accuracies, strict=True):
        axis.text(end - 5, accuracy, f"{accuracy:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set(xticks=range(0, 101, 10), ylim=(0, 1))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", action="append", required=True, metavar="LABEL=RUNS")
    parser.add_argument("--other", action="append", default=[], metavar="LABEL=RUNS", help="its validation text only")
    parser.add_argument("--out", type=Path, default=Path(".github"))
    arguments = parser.parse_args()
    curves, others = {}, {}
    for read, texts in ((curves, arguments.curve), (others, arguments.other)):
        for text in texts:
            label, _, pattern = text.partition("=")
            folders = sorted(glob.glob(pattern))
            if not folders:
                sys.exit(f"error: {text}: no such runs")
            read[label] = [read_run(folder) for folder in folders]
    if not len(arguments.curve + arguments.other) == len(curves | others) <= len(COLORS):
        sys.exit(f"error: the labels must differ and be {len(COLORS)} at most")
    plt.rcParams |= {"svg.hashsalt": "README", "svg.fonttype": "none", "font.family": "sans-serif"}
    figures = {
        "curves": draw_curves(curves, others),
        "mask_ratio": draw_mask_ratios(next(iter(curves.values()))),
    }
    for name, figure in figures.items():
        path = arguments.out / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(path, f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
