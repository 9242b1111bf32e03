"""`atoll partition show`: what each simulated client holds, as a table and as a picture, before anything is trained."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.plot import can_plot
from atoll.cli.show import working
from atoll.cli.simulate import given
from atoll.errors import AtollError
from atoll.plan import Plan

partitions = typer.Typer(help="How rows are spread over simulated clients.", no_args_is_help=True)
app.add_typer(partitions, name="partition")

_SHOWN = 20
_DRAWN = 200
_MOST = 20
"""More different targets than this are shown in four parts of equal size."""


@partitions.command()
def show(
    plan: Annotated[Path, typer.Argument(help="The plan, whose [data] says what is read.")],
    data: Annotated[Path, typer.Option(help="One source, whose rows are spread.")],
    clients: Annotated[int | None, typer.Option(min=1, help="Over so many clients; left out with key:COLUMN.")] = None,
    partition: Annotated[str, typer.Option(help="How; as for `atoll simulate`.")] = "iid",
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw it into this picture (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Show how many rows of each class every client would hold; of a feature shift, how strong each one's noise is."""
    from atoll.simulate.partition import deviation, strengths

    agreed = Plan.load(plan)
    with working("reading", quiet=as_json):
        y, parts, who = _parts(agreed.with_(data={"standardise": "no"}), data, clients, partition)
    names, labels = _labelled(y)
    counts = np.stack([np.bincount(labels[part], minlength=len(names)) for part in parts])
    if picture:
        _draw(counts, names, f"{agreed.plan.name}: {len(y):,} rows over {len(parts):,} clients, {partition}", picture)
    noise = None if (sigma := deviation(partition)) is None else strengths(sigma, len(parts))
    _tell(counts, names, who, noise, partition, as_json=as_json)


def _parts(plan: Plan, data: Path, clients: int | None, how: str) -> tuple[NDArray[Any], list[NDArray[np.intp]], list[str]]:
    """Return the targets, which of them each client would hold, and the clients' names."""
    from atoll.preprocess import prepare
    from atoll.simulate.partition import partition as spread

    if clients:
        y = prepare(data, plan).train.y
        return y, spread(y, clients, how, plan.plan.seed), [str(number + 1) for number in range(clients)]
    if not how.startswith("key:"):
        raise AtollError("--clients: over how many? It may be left out with --partition key:COLUMN alone")
    with tempfile.TemporaryDirectory(prefix="atoll-") as spool:
        each = {name: one.train.y for name, one in given(data, plan, None, how, Path(spool) / "rows", None).items()}
    y = np.concatenate(list(each.values()))
    return y, np.split(np.arange(len(y)), np.cumsum([len(one) for one in each.values()])[:-1]), list(each)


def _labelled(y: NDArray[Any]) -> tuple[list[str], NDArray[np.intp]]:
    """Return the targets' names, and which of them each row has."""
    values, which = np.unique(y, return_inverse=True)
    if len(values) <= _MOST:
        return [f"{value:g}" for value in values], which.reshape(-1)
    cuts = np.quantile(y, [0.25, 0.5, 0.75])
    edges = [f"{cut:.3g}" for cut in cuts]
    names = [f"to {edges[0]}", f"to {edges[1]}", f"to {edges[2]}", f"over {edges[2]}"]
    return names, np.searchsorted(cuts, y)


def distances(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how far each client's classes are from those of all rows: total variation, 0 for the same and towards 1.

    >>> distances(np.array([[2, 2], [4, 0], [2, 6]])).tolist()
    [0.0, 0.5, 0.25]
    """
    shares, whole = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), counts.sum(axis=0) / counts.sum()
    return np.asarray(np.abs(shares - whole).sum(axis=1) / 2)


def _tell(
    counts: NDArray[np.int64], names: list[str], who: list[str], noise: NDArray[np.float64] | None, how: str, *, as_json: bool
) -> None:
    sizes, far = counts.sum(axis=1), distances(counts)
    if as_json:
        facts = {"partition": how, "clients": who, "rows": sizes.tolist(), "classes": names, "counts": counts.tolist()}
        facts |= {} if noise is None else {"noise": [round(float(one), 4) for one in noise]}
        print(json.dumps({**facts, "distance": [round(float(one), 4) for one in far]}))
        return
    table = Table(
        title=f"rows of each class, {how}", title_justify="left", header_style="bold", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    for name in ("client", "rows", *names, "apart", *(["noise"] if noise is not None else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(counts[:_SHOWN]):
        more = [f"{noise[number]:.2f}"] if noise is not None else []
        table.add_row(who[number], str(sizes[number]), *(str(one) if one else "·" for one in row), f"{far[number]:.2f}", *more)
    Console().print(table)
    if len(counts) > _SHOWN:
        print(f"and {len(counts) - _SHOWN} more clients (--json has all)")
    if noise is not None:
        print("noise: the deviation of what is added to each number of a client's rows")
    middle = f"{np.median(sizes):.0f}"
    print(f"rows a client: {sizes.min()} to {sizes.max()}, the middle one {middle}")
    print(
        f"distance of its classes from those of all rows (total variation): {far.mean():.2f} on average, {far.max():.2f} at most"
    )


def _draw(counts: NDArray[np.int64], names: list[str], title: str, path: Path) -> None:
    if not can_plot():
        raise AtollError("plots need matplotlib: pip install 'atoll-fl[plot]'")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = counts[:_DRAWN]
    drawn = Figure(figsize=(min(14, 5 + 0.12 * len(shown)), 4), layout="constrained")
    axes = drawn.subplots()
    left, places = np.zeros(len(shown)), np.arange(1, len(shown) + 1)
    for at, name in enumerate(names):
        shade = colormaps["tab20" if len(names) > 10 else "tab10"](at)
        axes.bar(places, shown[:, at], bottom=left, width=0.9, color=shade, label=name)
        left += shown[:, at]
    more = f" (the first {_DRAWN})" if len(counts) > _DRAWN else ""
    axes.set(xlabel=f"client{more}", ylabel="rows", xlim=(0.4, len(shown) + 0.6))
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.legend(title="target", loc="outside right upper", fontsize=8)
    try:
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise AtollError(f"{path}: the plot can't be written ({error}); use .png, .svg or .pdf") from error
