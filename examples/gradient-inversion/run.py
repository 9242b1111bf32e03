"""Pictures for docs/how-to/gradient-inversion.md: what is read out of a node's update, plain, in a secure sum, with noise.

    python run.py [FOLDER]

Handwritten digits of 8 × 8 pixels that scikit-learn brings; a perceptron of 100 units; one node of 8 pictures among 10 nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from attack import Pictures, best, by_matching, by_units, nearest
from seen import masked, noised, psnr, trained
from sklearn.datasets import load_digits

mpl.use("Agg")
import matplotlib.pyplot as plt

SIZES, ROWS, NODES, STEPS = [64, 100, 10], 8, 10, 1000
MULTIPLIERS = (0.001, 0.01, 0.1, 1.0)


def main(folder: Path) -> None:
    """Attack each view of the first node's update, say how well it went, and draw what came of it."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    nodes = [(x[at : at + ROWS], y[at : at + ROWS]) for at in range(0, NODES * ROWS, ROWS)]
    true = nodes[0][0]
    happened, longer = trained(SIZES, nodes), trained(SIZES, nodes[:1], steps=10)
    model, update = happened.model.arrays, happened.updates[0]
    hidden, mean = masked(happened)

    def matched(seen: Mapping[str, Pictures], rows: int = ROWS) -> Pictures:
        return by_matching(model, seen, SIZES, rows, STEPS)

    plain = {
        "what the node has": true,
        "one step, by arithmetic": by_units(update.arrays),
        "one step, by matching": matched(update.arrays),
        "ten steps, by matching": matched(longer.updates[0].arrays),
    }
    secure = {
        "what the node has": true,
        "the masked update, by arithmetic": by_units(hidden.arrays),
        "the masked update, by matching": matched(hidden.arrays),
        f"the mean of {NODES} nodes, by matching": matched(mean.arrays, ROWS * NODES),
    }
    noisy = {"what the node has": true}
    noisy |= {f"noise {multiplier:g}, by matching": matched(noised(update, multiplier).arrays) for multiplier in MULTIPLIERS}
    folder.mkdir(parents=True, exist_ok=True)
    others = x[NODES * ROWS :]
    for count in (ROWS, NODES * ROWS):
        print(f"{count} pictures of others, for comparison: correlation {np.mean(best(others[:count], true)):.2f}")
    for name, rows in (("plain", plain), ("secure", secure), ("noise", noisy)):
        for title, found in list(rows.items())[1:]:
            close = nearest(found, true)
            print(f"{title}: {len(found)} pictures; correlation {np.mean(best(found, true)):.2f}, {psnr(close, true):.1f} dB")
        draw(rows, folder / f"{name}.png")


def draw(rows: Mapping[str, Pictures], path: Path) -> None:
    """Draw, under what a node has, the most similar of what was found."""
    true, side = next(iter(rows.values())), round(SIZES[0] ** 0.5)
    figure, axes = plt.subplots(len(rows), len(true), figsize=(len(true) * 0.8 + 2.6, len(rows) * 0.85), squeeze=False)
    for line, (title, found) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, nearest(found, true), strict=True):
            axis.imshow(picture.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("gradient-inversion"))
