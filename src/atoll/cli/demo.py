"""`atoll demo`: a whole federation on this machine, on real data, and what it gains against the other ways."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from atoll.cli import app, demo_data
from atoll.cli.plot import can_plot, curves, plot
from atoll.cli.run import show_run
from atoll.cli.show import figure, working
from atoll.errors import AtollError
from atoll.plan import Plan

Figures = Mapping[str, float]


class LogKind(StrEnum):
    """What carries the updates."""

    embedded = "embedded"
    kafka = "kafka"


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(help="How many hospitals, 2 to 10.")] = 3,
    rounds: Annotated[int, typer.Option(help="How many rounds.")] = 10,
    log: Annotated[LogKind, typer.Option(help="What carries the updates.")] = LogKind.embedded,
    seed: Annotated[int, typer.Option(help="Of the split of the rows, of the model and of training.")] = 7,
    directory: Annotated[Path, typer.Option("--dir", help="Where data, store, models and plot go.")] = Path("atoll-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Run a server and hospitals as processes of this machine, and compare federated, local-only and centralized."""
    began = time.monotonic()
    console = Console(quiet=as_json)
    data = demo_data.write(directory / "data", nodes, seed)
    with _broker(directory, log, console) as address:
        plan = template().with_(
            plan={"rounds": rounds, "seed": seed},
            cohort={"minimum": nodes},
            privacy={"secure_aggregation": nodes >= 3},
            log={"kafka": address},
        )
        (directory / "plan.json").write_text(plan.to_json())
        console.print(f"{nodes} hospitals, one server, {rounds} rounds; updates travel by the {log.value} log")
        history = _federate(plan, data, directory, console)
    federated = [row["holdout"] for row in history["rounds"]]
    console.print("the same plan for each hospital alone, and for all rows in one place …")
    with working("training them", quiet=as_json):
        local, centralized = compare(plan, nodes, seed)
    result = {
        "run": history["run"],
        "rounds": len(federated),
        "nodes": nodes,
        "log": log.value,
        "holdout": federated[-1],
        "local": [{"node": name, **judged} for name, judged in local.items()],
        "centralized": centralized,
        "seconds": round(time.monotonic() - began, 2),
    }
    console.print(_compared(federated[-1], local, centralized))
    _say_where(console, directory, history, local, centralized)
    console.print(f"{result['seconds']} s in all")
    if as_json:
        print(json.dumps(result))


def template() -> Plan:
    """Return the plan that the demo runs and that `atoll new` writes."""
    with as_file(files("atoll.cli") / "template") as folder:
        return Plan.load(folder / "plan.toml")


def compare(plan: Plan, nodes: int, seed: int) -> tuple[Mapping[str, Figures], Figures]:
    """Train the plan's model on each hospital's rows alone, and on all rows pooled; return how they do on the holdout."""
    import numpy as np

    from atoll import learners
    from atoll.preprocess import prepare
    from atoll.simulate import simulate

    _, tables = demo_data.tables(nodes, seed)
    arrays = {name: (table[:, :-1], table[:, -1]) for name, table in tables.items()}
    holdout = prepare(arrays.pop("holdout"), plan).judge
    alone = plan.with_(cohort={"minimum": 1}, privacy={"secure_aggregation": False})
    learner = learners.build(alone)
    pooled = tuple(np.concatenate(columns) for columns in zip(*arrays.values(), strict=True))
    local = {name: simulate(alone, {name: rows}, holdout=holdout, learner=learner).holdout for name, rows in arrays.items()}
    return local, simulate(alone, {"everybody": pooled}, holdout=holdout, learner=learner).holdout


@contextlib.contextmanager
def _broker(directory: Path, log: LogKind, console: Console) -> Iterator[str | None]:
    """A Kafka for as long as the demo runs, if it is to carry the updates; one that ran before goes on."""
    if log is LogKind.embedded:
        yield None
        return
    from atoll.logs import broker

    place = directory / "kafka"
    running = broker.status(place)
    started = running or broker.start(place, report=console.print)
    try:
        yield started.address
    finally:
        if running is None:
            broker.stop(place)


def _federate(plan: Plan, data: Mapping[str, Path], directory: Path, console: Console) -> dict[str, Any]:
    """Run the server and the nodes as processes; show rounds as they come; return the run's history."""
    hospitals = {name: path for name, path in data.items() if name != "holdout"}
    serve = [
        "serve",
        str(directory / "plan.json"),
        "--holdout",
        str(data["holdout"]),
        "--store",
        str(directory / "store"),
    ]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_process([*serve, "--port", "0", "--json"], directory / "server.log"))
        live = stack.enter_context(Live(console=console, auto_refresh=False))
        show = show_run(plan, live)
        for event in _events(server):
            if event["what"] == "history":
                return event
            show(event)
            if event["what"] == "listening":
                for name, path in hospitals.items():
                    join = [
                        "join",
                        event["url"],
                        "--data",
                        str(path),
                        "--name",
                        name,
                        "--dir",
                        str(directory / "nodes" / name),
                    ]
                    stack.enter_context(_process([*join, "--json"], directory / f"{name}.log", listen=False))
    logs = (directory / "server.log").read_text().strip().splitlines() or ["it said nothing"]
    raise AtollError(f"the demo's server ended early: {logs[-1]} (see {directory / 'server.log'})")


@contextlib.contextmanager
def _process(words: list[str], log: Path, *, listen: bool = True) -> Iterator[subprocess.Popen[str]]:
    """An `atoll` process that ends with this block, whatever happens."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        out = subprocess.PIPE if listen else errors
        process = subprocess.Popen([sys.executable, "-m", "atoll", *words], stdout=out, stderr=errors, text=True)
        try:
            yield process
            if not listen:
                process.wait(timeout=20)
        finally:
            for end in (process.terminate, process.kill):
                if process.poll() is None:
                    end()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=5)
            if process.stdout:
                process.stdout.close()


def _events(server: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in server.stdout or ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _compared(federated: Figures, local: Mapping[str, Figures], centralized: Figures) -> Table:
    table = Table(title="on the server's holdout", title_justify="left", header_style="bold")
    for name, side in (("trained on", "left"), ("accuracy", "right"), ("loss", "right")):
        table.add_column(name, justify="left" if side == "left" else "right")
    table.add_row("[bold]all hospitals, federated[/bold]", figure(federated, "accuracy"), figure(federated, "loss"))
    table.add_row("all rows in one place, centralized", figure(centralized, "accuracy"), figure(centralized, "loss"))
    for name, judged in local.items():
        table.add_row(f"{name} alone", figure(judged, "accuracy"), figure(judged, "loss"))
    mean = {name: sum(one[name] for one in local.values()) / len(local) for name in ("accuracy", "loss")}
    table.add_row("mean of those alone", figure(mean, "accuracy"), figure(mean, "loss"))
    return table


def _say_where(
    console: Console,
    directory: Path,
    history: Mapping[str, Any],
    local: Mapping[str, Figures],
    centralized: Figures,
) -> None:
    say: Callable[[str], None] = lambda line: console.print(line, soft_wrap=True)  # noqa: E731
    if can_plot():
        mean = sum(one["accuracy"] for one in local.values()) / len(local)
        lines = {"centralized": centralized["accuracy"], "local-only (mean)": mean}
        shown = {"federated": curves([history])["holdout"]}
        plot(shown, directory / "history.png", "on the server's holdout", lines)
        say(f"plot:  {directory / 'history.png'}")
    say(f"store: {directory / 'store'}   (atoll history --store {directory / 'store'})")
    say(f"model: {directory / 'store' / 'models' / history['best']}.safetensors, the best of the run")
