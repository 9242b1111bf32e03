"""`atoll simulate`: a plan over clients in this process; under strategy `map` with the bits of the deployed run."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from atoll.cli import app
from atoll.cli.look import Allow
from atoll.cli.run import Watch, show_run
from atoll.cli.show import clock, plainly, working
from atoll.errors import AtollError
from atoll.plan import Plan

if TYPE_CHECKING:
    from atoll.learner import Data
    from atoll.simulate import Simulated

_ENDINGS = (".csv", ".parquet", ".pq", ".npz")


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file (`atoll new DIR` writes one).")],
    data: Annotated[
        Path, typer.Option(help="A folder, each table in it a client's; with --clients: one source, whose rows are spread.")
    ],
    clients: Annotated[int | None, typer.Option(min=1, help="Spread the rows over so many clients.")] = None,
    partition: Annotated[
        str, typer.Option(help="How: iid, dirichlet:ALPHA, shards:NUMBER, quantity:ALPHA, shift:DEVIATION, time; or key:COLUMN.")
    ] = "iid",
    available: Annotated[
        int | None, typer.Option(min=1, help="So many clients are there in a round, drawn anew each time; without: all.")
    ] = None,
    holdout: Annotated[Path | None, typer.Option(help="Test rows; without: the clients' pooled metrics.")] = None,
    strategy: Annotated[
        str, typer.Option(help="map or pool (a deployed run's bits), scan or vmap (compiled, within 1e-5), auto (the fastest).")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads or processes; without: one a processor. Changes no result.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="ray: in processes of a Ray cluster, of this machine, or ray:HOST:PORT. Changes no result.")
    ] = None,
    devices: Annotated[
        Path | None,
        typer.Option(help="A file that says how fast clients are and when they are there: the run is in virtual time."),
    ] = None,
    judge_every: Annotated[int, typer.Option(min=1, help="Judge models every so many rounds, and after the last.")] = 1,
    store: Annotated[Path | None, typer.Option(help="A folder that keeps the run after each round.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --store, to the same bits.")] = False,
    start: Annotated[Path | None, typer.Option(help="A model to begin with, .safetensors or .keras.")] = None,
    to: Annotated[Path | None, typer.Option(help="Write the final model there, a .safetensors file.")] = None,
    allow: Allow = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Try a plan without a network, over as many clients as you like; --strategy map gives the bits of the deployed run."""
    from atoll.preprocess import prepare
    from atoll.simulate import simulate as run

    if to and to.suffix != ".safetensors":
        raise AtollError(f"--to: '{to.suffix}' is no ending of a model here: use .safetensors")
    if to and not to.parent.is_dir():
        raise AtollError(f"--to: {to.parent} is no folder; make it first, since the model is written there at the end")
    agreed = Plan.load(plan)
    with tempfile.TemporaryDirectory(prefix="atoll-") as spool:
        with working("getting ready", quiet=as_json):
            rows = prepare(holdout, agreed).judge if holdout else None
            there = given(data, agreed, clients, partition, Path(spool) / "rows", holdout)
        began = time.monotonic()
        console = Console(quiet=as_json)
        training = Spinner("dots", "training …") if console.is_terminal else ""  # until the first round's line is there
        with _kept(store), Live(training, console=console, refresh_per_second=8) as live:
            done = run(
                agreed, there, holdout=rows, allow=allow or (), watch=_timed(agreed, show_run(agreed, live)), start=start,
                strategy=strategy, workers=workers, backend=backend, judge_every=judge_every, store=store, resume=resume,
                devices=devices,
                there=_available(there, available, agreed),
            )  # fmt: skip
    if to:
        _write(done, to)
    _tell(agreed, done, round(time.monotonic() - began, 2), as_json=as_json)


@contextlib.contextmanager
def _kept(store: Path | None) -> Iterator[None]:
    """Say how a run that is stopped by Ctrl-C goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if store:
            print(f"what is done is kept in {store}: the same command with --resume goes on", file=sys.stderr)
        raise


def given(source: Path, plan: Plan, clients: int | None, how: str, spool: Path, holdout: Path | None) -> Mapping[str, Data]:
    """Return the clients: a table each, rows spread over so many, or those of each value of a key."""
    kind, _, column = how.partition(":")
    if kind != "key":
        return spread(source, plan, clients, how, spool) if clients else each(source, plan, holdout, spool)
    from atoll.preprocess import prepare
    from atoll.preprocess.keyed import keyed

    if clients:
        raise AtollError(f"--clients: how many there are follows from '{how}'; leave it out")
    files = keyed(source, plan, column, spool)
    return {name: prepare(path, plan, spool=path.with_suffix(".rows")) for name, path in files.items()}


def each(folder: Path, plan: Plan, holdout: Path | None, spool: Path) -> dict[str, Data]:
    """Every table of a folder is a client's, named after its file; the holdout's is none. Large ones are mapped from files."""
    from atoll.preprocess import prepare

    if not folder.is_dir():
        raise AtollError(f"--data: {folder} is no folder of the clients' tables; --clients spreads the rows of one")
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _ENDINGS]
    mine = [path for path in tables if not (holdout and holdout.exists() and path.samefile(holdout))]
    if not mine:
        raise AtollError(f"--data: {folder} holds no tables ({', '.join(_ENDINGS)})")
    return {path.stem: prepare(path, plan, spool=spool / path.name) for path in mine}


def spread(source: Path, plan: Plan, clients: int, how: str, spool: Path) -> Mapping[str, Data]:
    """Rows are spread as they are read, mapped from files where they are many; what a client does with its own comes after."""
    from atoll.preprocess import prepare
    from atoll.simulate import clients as made

    return made.spread(prepare(source, plan.with_(data={"standardise": "no"}), spool=spool), clients, how, plan)


def _available(clients: Mapping[str, Data], count: int | None, plan: Plan) -> Callable[[int], list[str]] | None:
    from atoll.simulate.clients import drawn

    if count is None:
        return None
    if not plan.cohort.minimum <= count <= len(clients):
        raise AtollError(
            f"--available: {count}; it lies between the plan's cohort.minimum, {plan.cohort.minimum}, and {len(clients)}"
        )
    return drawn(clients, count, plan.plan.seed)


def _timed(plan: Plan, watch: Watch) -> Watch:
    """A simulation tells of rounds as a server does, but for the seconds, the pace, and what they are judged by."""
    last = began = time.monotonic()

    def timed(event: Mapping[str, Any]) -> None:
        nonlocal last
        if event["what"] != "round":
            watch(event)
            return
        now = time.monotonic()
        rate = event["round"] / (now - began)
        pace = f"{rate:.1f} rounds/s, {(plan.plan.rounds - event['round']) / rate:.0f} s left"
        if "at" in event:
            pace += f"; virtual time {clock(event['at'])}"
        by = "holdout" if event["holdout"] else "nodes"
        watch({**event, "cohort": len(event["answered"]), "judged": event[by], "by": by, "seconds": now - last, "pace": pace})
        last = now

    return timed


def _judged(done: Simulated) -> dict[str, Any]:
    return {"holdout": done.holdout, "by_node": done.by_node}


def _more(said: str) -> str:
    return f" ({said})" if said else ""


def _write(done: Simulated, to: Path) -> None:
    from atoll.wire import pack

    try:
        to.write_bytes(b"".join(pack(done.model)))
    except OSError as error:
        raise AtollError(f"{to}: can't be written ({error.strerror})") from error


def _tell(plan: Plan, done: Simulated, seconds: float, *, as_json: bool) -> None:
    facts = {"plan": plan.plan.name, "reason": done.reason, "rounds": done.rounds, "model": done.digest}
    if as_json:
        print(json.dumps({**facts, **_judged(done), "strategy": done.strategy, "said": done.said, "seconds": seconds}))
        return
    print(f"{done.reason}, in {seconds} s: model {done.digest[:12]}, strategy {done.strategy}{_more(done.said)}")
    if "at" in done.rounds[-1]:
        print(f"  virtual time: {clock(done.rounds[-1]['at'])}")
    shown = {"the holdout": done.holdout} if done.holdout else dict(list(done.by_node.items())[:20])
    for name, judged in shown.items():
        print(f"  on {name}: {plainly(judged)}")
    if not done.holdout and len(done.by_node) > len(shown):
        print(f"  and on {len(done.by_node) - len(shown)} more (--json has all)")
