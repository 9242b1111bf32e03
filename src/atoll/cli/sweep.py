"""`atoll sweep` and `atoll compare`: many simulations of one plan side by side, in one table and one picture."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import Allow
from atoll.cli.plot import Curve, plot
from atoll.cli.show import clock, figure, told, working
from atoll.cli.simulate import given
from atoll.cli.swept import Swept
from atoll.errors import AtollError, PlanError, StoreError
from atoll.plan import Plan
from atoll.sections import nearest

if TYPE_CHECKING:
    from atoll.learner import Data, Rows
    from atoll.simulate import Simulated

DataOption = Annotated[Path, typer.Option("--data", help="As for `atoll simulate`: a folder, or with --clients one source.")]
Clients = Annotated[int | None, typer.Option(min=1, help="Spread the rows over so many clients.")]
Partition = Annotated[str, typer.Option(help="How; as for `atoll simulate`.")]
Holdout = Annotated[Path | None, typer.Option(help="Test rows; without: the clients' pooled metrics.")]
StrategyOption = Annotated[str, typer.Option(help="As for `atoll simulate`.")]
Picture = Annotated[Path | None, typer.Option("--plot", help="Draw all runs into this picture (.png, .svg, .pdf).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_ALONE = 10
"""At most so many clients are trained alone."""


class _Ground(NamedTuple):
    """What all runs have in common."""

    clients: Mapping[str, Data]
    holdout: Rows | None
    allow: Sequence[str]
    strategy: str
    devices: Path | None


@contextlib.contextmanager
def _ground(
    plan: Plan, data: Path, clients: int | None, how: str, holdout: Path | None, allow: Sequence[str], strategy: str,
    devices: Path | None = None,
) -> Iterator[_Ground]:  # fmt: skip
    from atoll.preprocess import prepare

    with tempfile.TemporaryDirectory(prefix="atoll-") as spool:
        with working("getting ready"):
            there = given(data, plan, clients, how, Path(spool) / "rows", holdout)
            rows = prepare(holdout, plan).judge if holdout else None
        yield _Ground(there, rows, allow, strategy, devices)


def _run(plan: Plan, ground: _Ground, clients: Mapping[str, Data] | None = None, **more: Any) -> dict[str, Any]:
    """Simulate; a run that can't be, or diverges, says why instead of figures."""
    from atoll.simulate import simulate

    began = time.monotonic()
    try:
        done = simulate(
            plan, clients or ground.clients, holdout=ground.holdout, allow=ground.allow, strategy=ground.strategy,
            devices=ground.devices, **more,
        )  # fmt: skip
    except StoreError:
        raise
    except AtollError as error:
        return {"figures": {}, "curve": [], "why": str(error), "seconds": round(time.monotonic() - began, 2)}
    return {**_judged(done), "why": "", "seconds": round(time.monotonic() - began, 2)}


def _judged(done: Simulated) -> dict[str, Any]:
    place = "holdout" if done.holdout else "nodes"
    times = {str(row["round"]): row["at"] for row in done.rounds if "at" in row}  # a key of JSON is text
    return {"figures": done.rounds[-1][place], "curve": [(row["round"], row[place]) for row in done.rounds], "times": times}


@app.command()
def sweep(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    data: DataOption,
    grid: Annotated[list[str], typer.Option(help="A key and its values: training.learning_rate=0.01,0.1; may be repeated.")],
    clients: Clients = None,
    partition: Partition = "iid",
    holdout: Holdout = None,
    target: Annotated[
        str | None,
        typer.Option(help="A run ends where a figure is reached, accuracy=0.97; the best one takes the fewest rounds."),
    ] = None,
    strategy: StrategyOption = "auto",
    devices: Annotated[
        Path | None, typer.Option(help="As for `atoll simulate`: with a target, the best run takes the least virtual time.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="A folder that keeps what is done.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --store; the grid may have grown.")] = False,
    picture: Picture = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a plan with every combination of some values, and say which does best, by the plan's stopping.metric.

    Which learning rate gets to 97 % in the fewest rounds?

    atoll sweep plan.toml --data train.csv --clients 20 --grid training.learning_rate=0.03,0.1,0.3 --target accuracy=0.97

    Ctrl-C shows what is done; with --store, the same command and --resume goes on from there.
    """
    agreed = _aimed(Plan.load(plan), target)
    keys = [_values(words) for words in grid]
    if twice := next((key for number, (key, _) in enumerate(keys) if key in dict(keys[:number])), None):
        raise AtollError(f"--grid: {twice} is there twice; put all its values into one, by commas")
    combined = itertools.product(*([(key, one) for one in values] for key, values in keys))
    plans = [(many, _changed(agreed, many)) for many in combined]
    common = {"data": data, "clients": clients, "partition": partition, "holdout": holdout, "devices": devices}
    swept = Swept.opened(store, {**common, "strategy": strategy}, resume=resume)
    rows: list[dict[str, Any]] = []
    with (
        _ground(agreed, data, clients, partition, holdout, allow or (), strategy, devices) as ground,
        _stopped(swept) as stopped,
        working("simulating", quiet=as_json) as say,
    ):
        for number, (many, changed) in enumerate(plans, 1):
            watch = _progress(say, f"{number} of {len(plans)}: {_named(many)}", changed)
            row = swept.row(changed, partial(_run, changed, ground, watch=watch))
            rows.append({"with": dict(many), **row, **_aim(changed, row)})
            if not as_json:
                print(f"{_named(many)}: {_said(rows[-1])}", flush=True)
    rows.sort(key=lambda row: (_soonest(row), -agreed.stopping.gain(row["figures"])))
    _show(rows, [_named(row["with"].items()) for row in rows], "best first", picture, as_json=as_json)
    if stopped:
        raise KeyboardInterrupt
    if all(row["why"] for row in rows):
        raise AtollError(f"no run came to its end: {rows[0]['why']}")


@contextlib.contextmanager
def _stopped(swept: Swept) -> Iterator[list[str]]:
    """Let Ctrl-C end a sweep, but not hide what is done of it; say how it goes on."""
    found: list[str] = []
    try:
        yield found
    except KeyboardInterrupt:
        found.append("stopped")
        print(swept.said, file=sys.stderr)


def _progress(say: Callable[[str], None], name: str, plan: Plan) -> Callable[[Mapping[str, Any]], None]:
    def watch(event: Mapping[str, Any]) -> None:
        if event["what"] == "round":
            say(f"{name}, round {event['round']}/{plan.plan.rounds}")

    say(name)
    return watch


def _aim(plan: Plan, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return when a run reached its target: after how many rounds, as papers count them, in which, and at what virtual time."""
    if plan.stopping.target is None:
        return {}
    rounds = plan.stopping.rounds_to_target(row["curve"])
    last = row["curve"][-1][0] if rounds is not None else None
    return {"rounds_to_target": rounds, "reached": last, "reached_at": row.get("times", {}).get(str(last))}


def _soonest(row: Mapping[str, Any]) -> float:
    found = row.get("reached_at") or row.get("rounds_to_target")
    return float("inf") if found is None else float(found)


def _values(words: str) -> tuple[str, list[Any]]:
    """Read a key and its values; a value that is a list is written as in JSON.

    >>> _values("training.learning_rate=0.1,1"), _values("aggregation.rule=fedavg")
    (('training.learning_rate', [0.1, 1]), ('aggregation.rule', ['fedavg']))
    >>> _values('compression.up=["rotate","4bit"],[]')
    ('compression.up', [['rotate', '4bit'], []])
    """
    key, _, said = words.partition("=")
    if "." not in key or not said.strip():
        raise AtollError(f"--grid: '{words}' isn't KEY=VALUE,VALUE: it looks like training.learning_rate=0.01,0.1")
    with contextlib.suppress(ValueError):
        return key, list(json.loads(f"[{said}]"))
    values: list[Any] = []
    for one in said.split(","):
        try:
            values.append(json.loads(one))
        except ValueError:
            values.append(one)
    return key, values


def _changed(plan: Plan, many: Sequence[tuple[str, Any]]) -> Plan:
    """Return the plan with other values; a key of three parts is one of a section's options."""
    for key, value in many:
        section, name, *rest = key.split(".")
        if rest:
            kept = plan.model_dump(mode="json").get(section, {}).get(name)
            value = {**(kept if isinstance(kept, dict) else {}), ".".join(rest): value}  # noqa: PLW2901
        try:
            plan = plan.with_(**{section: {name: value}})
        except PlanError as error:
            raise PlanError(f"--grid {key}: {error}") from None
    return plan


def _aimed(plan: Plan, target: str | None) -> Plan:
    """Return a plan whose runs end where a figure is reached."""
    if target is None:
        return plan
    name, _, said = target.partition("=")
    try:
        value = float(said)
    except ValueError:
        raise AtollError(f"--target: '{target}' isn't FIGURE=VALUE: it looks like accuracy=0.97") from None
    own = plan.stopping
    if own.patience and own.metric != name:
        raise PlanError(f"--target: the plan's stopping.patience watches '{own.metric}': name that figure, or leave patience out")
    try:
        return plan.with_(stopping={"metric": name, "target": value, "better": own.better if own.metric == name else None})
    except PlanError as error:
        raise PlanError(f"--target: {error}") from None


@app.command()
def compare(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    data: DataOption,
    rules: Annotated[str, typer.Option(help="Other methods, by commas; the plan's own is always among them.")] = "fedavg",
    clients: Clients = None,
    partition: Partition = "iid",
    holdout: Holdout = None,
    strategy: StrategyOption = "auto",
    picture: Picture = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Put a plan beside other methods, beside training in one place, and beside each client alone; the same rounds for all."""
    from atoll import algorithms

    agreed = Plan.load(plan)
    own = agreed.aggregation.rule
    plans, known = {own: agreed}, algorithms.known()
    for rule in (word.strip() for word in rules.split(",")):
        if rule not in known:
            raise AtollError(f"--rules: '{rule}' is not known{nearest(rule, known)}")
        plans.setdefault(rule, agreed.with_(aggregation={"rule": rule, "options": {}}))
    open_ = Plan.of({**agreed.model_dump(mode="json"), "privacy": {}})  # where all rows are in one place nothing is hidden
    plain = open_.with_(aggregation={"rule": "fedavg", "options": {}}, cohort={"minimum": 1, "fraction": 1.0})
    rows, names = [], []
    with _ground(agreed, data, clients, partition, holdout, allow or (), strategy) as ground:
        some = list(itertools.islice(ground.clients, _ALONE))
        for name, one, there in (
            *((f"federated, {rule}", changed, None) for rule, changed in plans.items()),
            ("all rows in one place", plain, {"everybody": _pooled(ground.clients)}),
            *((f"{client} alone", plain, {client: ground.clients[client]}) for client in some),
        ):
            rows.append(_run(one, ground, there))
            names.append(name)
            if not as_json:
                print(f"{name}: {_said(rows[-1])}", flush=True)
    rows = [{"name": name, **row} for name, row in zip(names, rows, strict=True)]
    _show(rows, names, "the same rounds for all", picture, as_json=as_json)


def _pooled(clients: Mapping[str, Data]) -> Data:
    """Return the rows of all clients together."""
    import numpy as np

    from atoll.learner import Data, Rows

    every = list(clients.values())
    sides = ([one.train for one in every], [one.test for one in every])
    return Data(*(Rows(np.concatenate([rows.x for rows in side]), np.concatenate([rows.y for rows in side])) for side in sides))


def _named(many: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in many)


def _said(row: Mapping[str, Any]) -> str:
    if row["why"]:
        return str(row["why"])
    figures, rounds = row["figures"], row["curve"][-1][0]
    return f"{', '.join(f'{name} {figure(figures, name)}' for name in told(figures))} after {rounds} rounds in {row['seconds']} s"


def _show(rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, picture: Path | None, *, as_json: bool) -> None:
    _print(rows, names, title, as_json=as_json)
    if picture:
        sys.stdout.flush()  # if the picture can't be, the figures are there
        shown: dict[str, Curve] = {name: row["curve"] for name, row in zip(names, rows, strict=True) if row["curve"]}
        plot(shown, picture, title)


def _print(rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    figures = list(dict.fromkeys(name for row in rows for name in told(row["figures"])))
    aimed = any("reached" in row for row in rows)
    timed = any(row.get("reached_at") for row in rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("run")
    for name in (*figures, *(["rounds to target"] if aimed else []), *(["after"] if timed else []), "seconds"):
        table.add_column(name, justify="right")
    for name, row in zip(names, rows, strict=True):
        more = [f"{row['rounds_to_target']:.1f}" if row["reached"] else "–"] if aimed else []
        more += [clock(row["reached_at"]) if row["reached_at"] else "–"] if timed else []
        cells = [figure(row["figures"], one) for one in figures]
        table.add_row(name, *cells, *more, f"{row['seconds']:.2f}")
    Console().print(table)
