"""How the seconds of a round grow, with the nodes and with the parameters: workload N at many sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.cli.bench.rounds import measure
from atoll.cli.plot import can_plot
from atoll.errors import AtollError

NODES = (2, 5, 10, 20, 50, 100, 200)
PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
_NODES_FIXED, _PARAMETERS_FIXED = 4, 1_000_000
_AXES = (
    ("nodes", f"nodes, {_PARAMETERS_FIXED:,} parameters each"),
    ("parameters", f"parameters, {_NODES_FIXED} nodes"),
)

Row = Mapping[str, Any]


def sizes() -> list[tuple[int, int]]:
    """Return the (nodes, parameters) that are measured: along one axis, then along the other."""
    return [(nodes, _PARAMETERS_FIXED) for nodes in NODES] + [(_NODES_FIXED, parameters) for parameters in PARAMETERS]


def grow(log: str) -> Iterator[Row]:
    """Measure each size; fewer rounds where they are long."""
    for nodes, parameters in sizes():
        yield measure(nodes, parameters, 3 if nodes * parameters > 50_000_000 else 8, log)


def beside(path: Path) -> list[Row]:
    """Read what others took: one JSON object a line, with `name`, `nodes`, `parameters` and `s_per_round`.

    Raises:
        AtollError: the file isn't that.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [{key: row[key] for key in ("name", "nodes", "parameters", "s_per_round")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AtollError(f"{path}: no lines of JSON with name, nodes, parameters, s_per_round ({error})") from error


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw both axes, each on logarithmic scales; a row without a `name` is Atoll's, with its floor where it has one.

    Raises:
        AtollError: matplotlib isn't installed, or the file can't be written.
    """
    if not can_plot():
        raise AtollError("plots need matplotlib: pip install 'atoll-fl[plot]'")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    fixed = {"nodes": ("parameters", _PARAMETERS_FIXED), "parameters": ("nodes", _NODES_FIXED)}
    for axes, (axis, label) in zip(drawn.subplots(1, 2, sharey=True), _AXES, strict=True):
        other, at = fixed[axis]
        for name, points in _lines([row for row in rows if row[other] == at], axis).items():
            style = {"linestyle": "--", "marker": "."} if "floor" in name else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    drawn.axes[0].set_ylabel("seconds a round")
    drawn.axes[0].legend(fontsize=8)
    try:
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise AtollError(f"{path}: the plot can't be written ({error})") from error


def _lines(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = row.get("name") or f"Atoll, {row['log']}"
        lines.setdefault(name, []).append((row[axis], row["s_per_round"]))
        if row.get("floor_s_per_round"):
            lines.setdefault(f"floor, {row['log']}", []).append((row[axis], row["floor_s_per_round"]))
    return {name: sorted(points) for name, points in lines.items()}
