"""`atoll privacy`: what a plan's noise promises, and what would have to change for another promise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import AsJson
from atoll.errors import AtollError, PlanError
from atoll.plan import Plan
from atoll.privacy.dp.account import Account

SOLVE = ("noise", "rounds", "cohort")
_LINES = 8


@app.command()
def privacy(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows a node trains on, for example_noise.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The ε to reach over the whole run.")] = None,
    solve: Annotated[str | None, typer.Option(help="What may change for it: noise, rounds or cohort.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a plan's noise promises over its rounds, and whom it hides; with --epsilon and --solve, what another ε takes."""
    if (epsilon is None) != (solve is None):
        raise AtollError("--epsilon and --solve go together: which ε, and what may change for it (noise, rounds or cohort)")
    if solve not in (None, *SOLVE):
        raise AtollError(f"--solve: '{solve}' is none; it is one of {', '.join(SOLVE)}")
    found = told(Plan.load(plan), rows)
    if epsilon is not None and solve is not None:
        found["solved"] = solved(Plan.load(plan), rows, epsilon, solve)
    if as_json:
        print(json.dumps(found))
        return
    _show(found)


def told(plan: Plan, rows: int | None) -> dict[str, Any]:
    """Return what a plan promises, as plain values.

    Raises:
        AtollError: it has no noise, or one of which the nodes' rows have to be known.
    """
    about = _account(plan, rows)
    rounds = plan.plan.rounds if about.most is None else min(plan.plan.rounds, about.most)
    marks = sorted({max(1, round(rounds * part / _LINES)) for part in range(1, _LINES + 1)})
    return {
        "plan": plan.plan.name,
        "mechanism": plan.privacy.mechanism,
        "unit": about.unit,
        "neighbours": about.relation,
        "multiplier": about.multiplier,
        "rate": about.rate,
        "steps": about.steps,
        "delta": about.delta,
        "rounds": rounds,
        "planned": plan.plan.rounds,
        "budget": about.promise,
        "epsilon": about.spent(rounds),
        "by_round": [{"round": one, "epsilon": about.spent(one)} for one in marks],
    }


def solved(plan: Plan, rows: int | None, epsilon: float, what: str) -> dict[str, float]:
    """Return the noise multiplier, the rounds, or the part of the nodes that an ε allows, all else as planned.

    Raises:
        AtollError: nothing does; or the cohort is asked for where the draw isn't secret.
    """
    from atoll.privacy.dp.accountant import multiplier_for, rate_within, steps_within

    about, rounds = _account(plan, rows), plan.plan.rounds
    if what == "noise":
        needed = multiplier_for(epsilon, about.steps * -(-rounds // about.span), about.delta, about.rate)
        return {"multiplier": needed, "epsilon": replace(about, multiplier=needed).spent(rounds)}
    if what == "rounds":
        most = steps_within(epsilon, about.multiplier, about.delta, about.rate) // about.steps * about.span
        if not most:
            raise AtollError(f"--epsilon: one round takes ε {about.spent(1):.4g} already; raise the noise (--solve noise)")
        return {"rounds": most, "epsilon": about.spent(most)}
    if not (plan.privacy.central_noise and plan.cohort.draw == "poisson"):
        raise AtollError("--solve cohort: a known draw hides nobody: set cohort.draw = 'poisson', with central_noise")
    rate = rate_within(epsilon, about.multiplier, rounds, about.delta)
    if not rate:
        raise AtollError("--epsilon: no cohort is small enough for it; raise the noise (--solve noise)")
    return {"fraction": rate, "epsilon": replace(about, rate=rate).spent(rounds)}


def _account(plan: Plan, rows: int | None) -> Account:
    from atoll.privacy.dp.account import account

    if plan.privacy.noise is None:
        raise PlanError("privacy: the plan adds no noise, so ε has no bound; docs/how-to/differential-privacy.md shows how")
    if (noise := plan.privacy.example_noise) and rows is None and noise.rows is None:
        raise AtollError(
            "--rows: how often a row is drawn follows from how many a node trains on; name it for this node, or in the plan "
            "for all (privacy.example_noise.rows)"
        )
    about = account(plan, rows)
    assert about is not None  # noqa: S101  there is noise, and its rows are known
    return about


def _show(found: Mapping[str, Any]) -> None:
    console = Console()
    console.print(
        f"[bold]ε {found['epsilon']:.4g}[/bold] at δ {found['delta']:g}, for {found['unit']}, after {found['rounds']} rounds"
    )
    if found["rounds"] < found["planned"]:
        console.print(f"of {found['planned']} that are planned: the budget of ε {found['budget']:g} ends the run")
    console.print(
        f"{found['mechanism']}: noise of {found['multiplier']:.4g} times what {found['unit']} can change", soft_wrap=True
    )
    if found["rate"] < 1:
        console.print(f"drawn with a chance of {found['rate']:.4g}, {found['steps']} times a round", soft_wrap=True)
    console.print(f"{found['neighbours']}.", soft_wrap=True)
    table = Table(header_style="bold")
    for name in ("round", "ε so far"):
        table.add_column(name, justify="right")
    for row in found["by_round"]:
        table.add_row(str(row["round"]), f"{row['epsilon']:.4g}")
    console.print(table)
    if "solved" in found:
        said = ", ".join(f"{name} {value:.5g}" for name, value in found["solved"].items())
        console.print(f"for that: [bold]{said}[/bold]")
