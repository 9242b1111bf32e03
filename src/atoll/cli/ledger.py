"""`atoll ledger`: what left a node, by its own record."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import AsJson
from atoll.cli.show import size
from atoll.errors import AtollError
from atoll.learner import summary

if TYPE_CHECKING:
    from atoll.store.ledger import Spent

_SHOWN = ("at", "run", "round", "attempt", "digest", "bytes", "guard", "epsilon", "delta", "plan", "verdict", "reason")


@app.command()
def ledger(
    directory: Annotated[Path, typer.Option("--dir", help="The node's directory, as for join.")] = Path("atoll-node"),
    run: Annotated[str | None, typer.Option(help="Only this run: its id, or the start of it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what left this node: when, in which round, how much, protected by what; written before it left."""
    from atoll.store.ledger import Ledger, bounds

    if not (directory / "ledger.sqlite").exists():
        raise AtollError(f"{directory}: no ledger is there; name the node's directory with --dir")
    with closing(Ledger(directory)) as kept:
        entries = [{fact: row[fact] for fact in _SHOWN} for row in kept.entries() if row["run"].startswith(run or "")]
        figures = [row for row in kept.figures() if row["run"].startswith(run or "")]
    if run and not entries and not figures:
        raise AtollError(f"--run: nothing left for a run '{run}'; without --run all runs are shown")
    totals = _totals(entries, bounds(entries).values())
    if as_json:
        print(json.dumps({"entries": entries, "figures": figures, "totals": totals}))
        return
    _show(entries, figures, totals)


def _totals(entries: Sequence[Mapping[str, Any]], bounds: Collection[Spent]) -> dict[str, Any]:
    """Add up: what is told in several runs is bounded by the sum of their ε and δ, where each is bounded at all."""
    bounded = bool(entries) and all(row["epsilon"] is not None for row in entries)
    return {
        "updates": len(entries),
        "runs": len({row["run"] for row in entries}),
        "bytes": sum(row["bytes"] for row in entries),
        "epsilon": sum(one.epsilon for one in bounds) if bounded else None,
        "delta": sum(one.delta for one in bounds) if bounded else None,
    }


def _show(entries: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> None:
    console = Console()
    if entries:
        table = Table(header_style="bold")
        for name in ("when", "run", "round", "digest", "bytes", "guard", "ε so far", "what became of it"):
            table.add_column(name, overflow="fold", justify="right" if name in ("bytes", "ε so far") else "left")
        for row in entries:
            became = (row["verdict"] or "not known") + (f": {row['reason']}" if row["reason"] else "")
            again = f" (try {row['attempt']})" if row["attempt"] > 1 else ""
            epsilon = "no bound" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
            about = _when(row), row["run"], f"{row['round']}{again}", row["digest"][:12], size(row["bytes"]), row["guard"]
            table.add_row(*about, epsilon, became)
        console.print(table)
    for row in figures:
        said = ", ".join(f"{name} {value:.4f}" for name, value in summary(row["figures"]).items())
        console.print(f"{_when(row)}: how the final model of run {row['run']} does on this node's rows: {said}", soft_wrap=True)
    bound = "" if totals["epsilon"] is None else f"; ε {totals['epsilon']:.3g}, δ {totals['delta']:.3g} in all"
    console.print(f"{totals['updates']} updates of {totals['runs']} runs left, {size(totals['bytes'])}{bound}", soft_wrap=True)


def _when(row: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["at"]))
