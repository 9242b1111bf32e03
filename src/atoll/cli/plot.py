"""Runs as pictures, by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.errors import AtollError
from atoll.metrics import ASIDE

Curve = Sequence[tuple[int, Mapping[str, float]]]
"""Rounds, and the figures of the model that each made."""
_MOST_PANELS = 4
_FEW = 3
"""So many curves and fewer leave room for their names in each panel."""
_STYLES = ("-", "--", ":")
"""The first ten curves, for which there are colours, the second ten and the third."""


def can_plot() -> bool:
    """Say whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return label → curve for each place that judged the models of some runs, as `SqlStore.history` tells them.

    A label says no more than is needed to tell the curves apart.
    """
    found: dict[str, Curve] = {}
    names = [run["name"] for run in runs]
    for run in runs:
        who = [] if len(runs) == 1 else [run["name"] if names.count(run["name"]) == 1 else f"{run['name']} {run['run']}"]
        for place, label in (("holdout", "holdout"), ("nodes", "nodes' own rows")):
            # The initial model is left out: beside it every later one looks the same.
            if curve := [(row["round"], row[place]) for row in run["rounds"] if row[place]]:
                found[", ".join([*who, label])] = curve
    return found


def plot(
    shown: Mapping[str, Curve],
    path: Path,
    title: str = "",
    lines: Mapping[str, float] | None = None,
    asked: Collection[str] = (),
) -> None:
    """Draw loss, accuracy (of numbers: R²) and a plan's metrics by round into a picture.

    Args:
        shown: label → curve.
        path: the picture's file; its ending says the kind.
        title: over all.
        lines: label → an accuracy to compare with, drawn across.
        asked: the well-known metrics that the plan names.

    Raises:
        AtollError: matplotlib isn't installed, there is nothing to draw, or the file can't be written.
    """
    if not can_plot():
        raise AtollError("plots need matplotlib: pip install 'atoll-fl[plot]'")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    there = dict.fromkeys(name for curve in shown.values() for _, judged in curve for name in judged)
    own = [name for name in there if name not in ASIDE]
    panels = [name for name in dict.fromkeys(("loss", "accuracy", *asked, "r2", *own)) if name in there][:_MOST_PANELS]
    if not panels:
        raise AtollError(f"{path}: there is nothing to draw: no model of the run was judged")
    many = len(shown) > _FEW
    drawn = Figure(figsize=(4.6 * len(panels) + 2 * many, 3.6), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    for axes, name in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for shade, (label, curve) in enumerate(shown.items()):
            points = [(at, judged[name]) for at, judged in curve if name in judged]
            if points:
                marker = "o" if len(points) <= 60 else ""
                axes.plot(
                    *zip(*points, strict=True),
                    marker=marker,
                    markersize=3,
                    label=label,
                    color=f"C{shade}",
                    linestyle=_STYLES[shade // 10 % 3],
                )
        for shade, (label, value) in enumerate(lines.items() if lines and name == "accuracy" else ()):
            axes.axhline(value, linestyle="--", linewidth=1, color=f"C{shade + len(shown)}", label=label)
        axes.set(xlabel="round", ylabel="R²" if name == "r2" else name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _explain(drawn, beside=many)
    try:
        drawn.savefig(path, dpi=150)
    except OSError as error:
        raise AtollError(f"{path}: the plot can't be written ({error.strerror})") from error
    except ValueError as error:
        raise AtollError(f"{path}: the ending says the kind of picture: use .png, .svg or .pdf") from error


def _explain(drawn: Any, *, beside: bool) -> None:
    """Say which curve is which, in each panel, or beside all of them: upon a panel many names would hide some curves."""
    if not beside:
        for axes in drawn.axes:
            axes.legend(fontsize=8)
        return
    names = dict(pair for axes in drawn.axes for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(list(names.values()), list(names), loc="outside right upper", fontsize=8)
