"""`atoll serve` and `atoll join`: the two halves of a real run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from atoll.cli import app
from atoll.cli.look import Allow
from atoll.cli.reach import Ca, ClientCertificate, KafkaConfig, Pin
from atoll.cli.show import figure, printed, round_line, rounds_table, size, size_of, told, working
from atoll.errors import AtollError
from atoll.plan import Plan

if TYPE_CHECKING:
    from atoll.node.runtime import Node

Watch = Callable[[Mapping[str, Any]], None]


@app.command()
def serve(
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file (`atoll new DIR` writes one).")],
    holdout: Annotated[
        Path | None,
        typer.Option(help="The server's own test rows, a file or folder as for join; without: the nodes' pooled metrics."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; other machines need 0.0.0.0, and --tls.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8740,
    store: Annotated[Path, typer.Option(help="Where history, models and the embedded log are kept.")] = Path("atoll-store"),
    quota: Annotated[
        str | None, typer.Option(help="The most the store may take, such as 50GB: beyond it updates wait until you prune.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="A model to begin with, .safetensors or .keras; without: a new one by the plan's seed.")
    ] = None,
    allow: Allow = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this plan's newest run, where a server that died or was stopped left it.")
    ] = False,
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Speak TLS, by a CA made in the store on first use; prints the pin for nodes."),
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak TLS by these certificates, a PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-cert, a PEM file.")] = None,
    client_certificates: Annotated[
        bool,
        typer.Option("--client-certificates", help="Let in only who shows a certificate that `atoll keys certificate` made."),
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without TLS.")] = False,
    kafka_config: KafkaConfig = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as one JSON object a line; the last is the run.")
    ] = False,
) -> None:
    """Serve a plan: wait for nodes, run its rounds, keep every model and the history."""
    from atoll.preprocess import prepare
    from atoll.server import web
    from atoll.server.runtime import Server

    agreed = Plan.load(plan)
    web.open_more()
    limit = size_of(quota) if quota else None
    with working("reading the holdout", quiet=as_json):
        rows = prepare(holdout, agreed).judge if holdout else None
    if (tls_cert is None) != (tls_key is None):
        raise AtollError("--tls-cert and --tls-key belong together: name both files")
    secure = {"tls": (tls_cert, tls_key) if tls_cert else tls, "insecure": insecure, "client_certificates": client_certificates}
    options: Any = {
        "holdout": rows,
        "store": store,
        "quota": limit,
        "start": start,
        "allow": allow or (),
        "resume": resume,
        "kafka_config": kafka_config,
    }
    options |= secure
    if as_json:
        with printed() as watch:
            history = Server(agreed, host=host, port=port, watch=watch, **options).serve()
        print(json.dumps({"what": "history", **history}), flush=True)
        return
    console = Console()
    live = Live(console=console, refresh_per_second=8, transient=False, auto_refresh=False)
    with working("building the model"):
        server = Server(agreed, host=host, port=port, watch=show_run(agreed, live), **options)
    with live:
        history = server.serve()
    console.print(f"{history['reason']}; run [bold]{server.run}[/bold]")
    console.print(f"history: atoll history {server.run} --store {store}", soft_wrap=True)
    console.print(f"model:   atoll export {server.run} --store {store} --to model.safetensors", soft_wrap=True)


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="The server's address, for instance http://127.0.0.1:8740.")],
    data: Annotated[
        str,
        typer.Option(
            help="This node's rows, which stay here: a CSV, Parquet or .npz file, a folder of CSV or Parquet files or of "
            "pictures, a database's URL such as postgresql+psycopg://user@host/base, or python:package.module:function."
        ),
    ],
    query: Annotated[str | None, typer.Option(help="What to ask the database for: one SELECT.")] = None,
    name: Annotated[str | None, typer.Option(help="What people call this node; by default it is named after its key.")] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where key, ledger, unsent updates and the final model are kept.")
    ] = Path("atoll-node"),
    plan: Annotated[str | None, typer.Option(help="Take part only in the plan with this digest.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What you agree to, whatever a server asks: a TOML file (`atoll policy new`).")
    ] = None,
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    token: Annotated[str | None, typer.Option(help="To join for the first time, as `atoll nodes add` showed it.")] = None,
    kafka_config: KafkaConfig = None,
    allow: Allow = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what would be used; nothing is sent.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as one JSON object a line; the last is the result.")
    ] = False,
) -> None:
    """Join a run with this machine's data: the model comes here, only updates leave."""
    from atoll.cli.owner import consent
    from atoll.learner import summary
    from atoll.node.runtime import Node
    from atoll.preprocess import Query
    from atoll.tls import Trust

    if policy:
        plan = plan or consent(url, Trust(pin, ca, certificate), policy, directory, allow)
    with _print_json_or_say(as_json) as watch:
        source = data if query is None else Query(data, query)
        about: Any = {"plan": plan, "policy": policy, "allow": allow or (), "pin": pin, "ca": ca, "token": token}
        about |= {"kafka_config": kafka_config, "certificate": certificate}
        node = Node(url, source, name=name, directory=directory, watch=watch, **about)
        if check:
            _show_check(node, as_json)
            return
        end = node.start()
    judged = summary(node.metrics)
    if as_json:
        print(json.dumps({"what": "ended", **end.payload(), "metrics": judged}), flush=True)
        return
    print(f"{end.reason}: loss {figure(judged, 'loss')}, accuracy {figure(judged, 'accuracy')} on this node's rows")
    if node.kept:
        print(f"final model: {directory / 'final.safetensors'}")
        if (mine := directory / "personal.safetensors").exists():
            print(f"this node's own: {mine}")


def _show_check(node: Node, as_json: bool) -> None:
    """Say what a run would use of this node's data."""
    from atoll.preprocess import described

    said = described(node.check())
    said["left_out"] = max(0, node.holding.read - said["train"] - said["test"])
    if as_json:
        print(json.dumps({"what": "checked", **said}), flush=True)
        return
    print(f"rows: {said['train']} to train on, {said['test']} to judge by, {said['left_out']} left out")
    print(f"each: {' × '.join(map(str, said['shape']))} numbers")
    if said["classes"]:
        print(f"target: {', '.join(f'{name} in {count} rows' for name, count in said['classes'].items())}")
    print("nothing was sent; without --check this node takes part")


@contextlib.contextmanager
def _print_json_or_say(as_json: bool) -> Iterator[Watch]:
    """Give what shows a node's events: one JSON object a line, or lines for people and a bar while rows are read."""
    if as_json:
        with printed() as watch:
            yield watch
        return
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("getting ready", total=None)

        def watch(event: Mapping[str, Any]) -> None:
            if event["what"] in ("reading", "standardising"):
                bar.update(task, description=event["what"], completed=event["rows"], total=event["of"], visible=True)
                return
            if event["what"] == "ready":
                bar.stop()
            _say(event)

        yield watch


def show_run(plan: Plan, live: Live) -> Watch:
    """Show a server's events: a table of the newest rounds, and lines above it for what happens between.

    Where no terminal is, a log file or a container, each round is a line of its own as it closes.
    """
    rounds: list[Mapping[str, Any]] = []
    asked = plan.model.known_metrics

    def watch(event: Mapping[str, Any]) -> None:
        what = event["what"]
        if what == "round" and live.console.is_terminal:
            rounds.append(event)
            title = f"{plan.plan.name}: judged by {event['by']}{', ' + event['pace'] if 'pace' in event else ''}"
            newest = rounds[-max(5, live.console.height - 12) :]
            live.update(rounds_table(newest, plan.plan.rounds, title, asked), refresh=True)
        elif what == "round":
            live.console.print(round_line(event, plan.plan.rounds, asked), soft_wrap=True)
        elif what == "strategy":
            taken = ", ".join(f"{how} {ms:.2f}" for how, ms in event["ms_per_client"].items())
            live.console.print(f"strategy {event['strategy']}: the fastest here (ms a client: {taken})", soft_wrap=True)
        elif what == "listening":
            said = f"run {event['run']}: listening on {event['url']}, waiting for {event['minimum']} nodes"
            live.console.print(said, soft_wrap=True)
            live.console.print(f"the server's key: {event['key']}", soft_wrap=True)
            live.console.print(f"watch it: open {event['url']} in a browser", soft_wrap=True)
            allow = "".join(f" --allow {name}" for name in plan.model.functions)
            pin = f" --pin {event['pin']}" if event["pin"] else ""
            live.console.print(f"on each node: atoll join {event['url']}{pin} --data FILE{allow}", soft_wrap=True)
        elif what in ("joined", "lost", "declined", "rejected", "revoked", "slowed"):
            why = f": {event['reason']}" if event.get("reason") else ""
            live.console.print(f"{event['name'] or event['node']} {what}{why}", soft_wrap=True)
        elif what == "waiting":
            live.console.print(f"waiting: {event['reason']}", soft_wrap=True)

    return watch


def _say(event: Mapping[str, Any]) -> None:
    """Show a node's events as lines."""
    lines: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        "ready": lambda e: f"plan {e['plan']}: {e['rounds']} rounds; {e['train']} training and {e['test']} test rows here",
        "connected": lambda e: f"connected: run {e['run']}, round {e['round']}",
        "refused": lambda e: f"nothing is done for this plan: {e['reason']}",
        "not_kept": lambda e: f"the final model isn't kept: {e['reason']}",
        "held_out": lambda e: f"held out until round {e['until']} is over, for updates that were refused; waiting",
        "waiting": lambda e: str(e["reason"]),
        "training": lambda e: f"round {e['round']}: training …",
        "trained": lambda e: (
            f"round {e['round']}: trained in {e['seconds']:.2f} s; the model as received: {_figures(e['received'])}"
        ),
        "sent": lambda e: f"round {e['round']}: sent {size(e['bytes'])}",
        "declined": lambda e: f"round {e['round']}: declined: {e['reason']}",
        "verdict": lambda e: "" if e["accepted"] else f"round {e['round']}: the update doesn't count: {e['reason']}",
    }
    if (say := lines.get(event["what"])) and (line := say(event)):
        print(line, flush=True, file=sys.stderr if event["what"] == "waiting" else sys.stdout)


def _figures(judged: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {figure(judged, name)}" for name in told(judged))
