"""The README's picture of the dial, from tables that `tests/tools/dial.py` printed into files, one for each text:

    python tests/tools/figures.py "starter stories=starter.md" "tiny Shakespeare=shakespeare.md"

Needs `pip install matplotlib`, which nothing else here does. Writes .github/dial.svg: over the length of the blocks the
bound and, apart from it, the exact likelihood from left to right.
"""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def read_table(path):
    """[(block length, bound or None, exact)] of the rows of a table."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in Path(path).read_text().splitlines()]
    rows = [row for row in rows if row[0].isdecimal()]
    return [
        (int(row[0]), *(float(cell.split()[0]) if re.match(r"\d", cell) else None for cell in row[2:4])) for row in rows
    ]


def draw(tables):
    plt.rcParams |= {"svg.hashsalt": "README", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.4), layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes[0], tables.items(), strict=True):
        for column, label, style in ((1, "bound", "o-"), (2, "exact, left to right", "s:")):
            points = sorted((row[0], row[column]) for row in rows if row[column] is not None)
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=title, xlabel="bytes in a block", ylabel="bits per byte", xscale="log")
        axis.set_xticks([row[0] for row in rows], [str(row[0]) for row in rows], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    path = Path(".github/dial.svg")
    draw({text.partition("=")[0]: read_table(text.partition("=")[2]) for text in sys.argv[1:]}).savefig(
        path, metadata={"Date": None}
    )
    print(path, f"{path.stat().st_size:,} bytes")
