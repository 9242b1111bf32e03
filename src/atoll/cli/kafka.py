"""`atoll kafka`: a real single-node Kafka on this machine, for development and tests, and whom it lets in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import app
from atoll.cli.show import working
from atoll.errors import AtollError
from atoll.plan import Log

kafka = typer.Typer(help="A real single-node Kafka (KRaft) on loopback, for development and tests.", no_args_is_help=True)
users = typer.Typer(help="Whom a broker that was started with --secure lets in.", no_args_is_help=True)
app.add_typer(kafka, name="kafka")
kafka.add_typer(users, name="users")
Directory = Annotated[Path, typer.Option("--dir", help="Where the broker keeps its data.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_HERE = Path("atoll-kafka")


@kafka.command()
def start(
    directory: Directory = _HERE,
    port: Annotated[int | None, typer.Option(help="The port on 127.0.0.1; a free one by default.")] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="TLS, a password for each, and nobody does more than their part; stays so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the broker, or find it running; the first time its jars are fetched with Maven."""
    from atoll.logs import broker, guarded

    with working("a broker needs some 15 seconds", quiet=as_json):
        running = broker.start(directory, port, report=lambda line: None if as_json else print(line, flush=True), secure=secure)
    if secure and not running.secure:
        raise AtollError(f"{directory}: a broker runs there that asks nobody who comes; choose another --dir for a --secure one")
    if as_json:
        told = {"address": running.address, "pid": running.pid, "directory": str(running.directory), "secure": running.secure}
        print(json.dumps(told))
        return
    more = ', topics = "node"' if running.secure else ""
    print(f'Kafka answers on {running.address}; in a plan: log = {{ kafka = "{running.address}"{more} }}')
    if running.secure:
        print(f"the server: atoll serve PLAN --kafka-config {guarded.file(directory, guarded.SERVER)}")
        print(f"each node: atoll kafka users add NODE --dir {directory}   (its id, as `atoll keys new` shows it)")


@kafka.command()
def stop(directory: Directory = _HERE) -> None:
    """Stop the broker; its data stays."""
    from atoll.logs import broker

    print("stopped" if broker.stop(directory) else f"no broker runs in {directory}")


Node = Annotated[str, typer.Argument(help="The node's id, 32 characters, as `atoll keys new` shows it.")]


@users.command()
def add(
    node: Node,
    directory: Directory = _HERE,
    prefix: Annotated[str, typer.Option(help="The plan's log.prefix.")] = Log().prefix,
    as_json: AsJson = False,
) -> None:
    """Let a node write to its own topic, and write the file by which the broker knows it; again: a new password."""
    from atoll.logs import guarded

    if not re.fullmatch("[0-9a-f]{32}", node):
        raise AtollError(
            f"'{node}' is no node's id: 32 of the signs 0-9 and a-f, as `atoll keys new` and `atoll nodes list` show it"
        )
    topic = Log(prefix=prefix).topic
    path = guarded.allow(directory, _running(directory), node, topic)
    if as_json:
        print(json.dumps({"node": node, "topic": f"{topic}.{node}", "file": str(path)}))
        return
    print(f"{path}: only its node may have it, over a way that nobody reads")
    print(f"there: atoll join URL --data FILE --kafka-config {path.name}")


@users.command("list")
def list_(directory: Directory = _HERE, as_json: AsJson = False) -> None:
    """Show whom the broker knows."""
    from atoll.logs import guarded, users

    known = users.known(_running(directory), guarded.admin(directory))
    print(json.dumps({"users": known}) if as_json else "\n".join(known))


@users.command()
def revoke(node: Node, directory: Directory = _HERE, as_json: AsJson = False) -> None:
    """Let a node write no more, at once; its topic stays, for the runs that it took part in."""
    from atoll.logs import guarded

    guarded.refuse(directory, _running(directory), node)
    print(json.dumps({"node": node}) if as_json else f"{node} may write no more")


def _running(directory: Path) -> str:
    """Return the address of the broker of a directory."""
    from atoll.logs import broker

    if (running := broker.status(directory)) is None:
        raise AtollError(f"{directory}: no broker runs there; `atoll kafka start --secure --dir {directory}`")
    return running.address
