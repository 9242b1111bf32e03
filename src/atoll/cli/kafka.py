"""`atoll kafka start|stop`: a real single-node Kafka on this machine, for development and tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import app
from atoll.cli.show import working

kafka = typer.Typer(help="A real single-node Kafka (KRaft) on loopback, for development and tests.", no_args_is_help=True)
app.add_typer(kafka, name="kafka")
Directory = Annotated[Path, typer.Option("--dir", help="Where the broker keeps its data.")]
_HERE = Path("atoll-kafka")


@kafka.command()
def start(
    directory: Directory = _HERE,
    port: Annotated[int | None, typer.Option(help="The port on 127.0.0.1; a free one by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Start the broker, or find it running; the first time its jars are fetched with Maven."""
    from atoll.logs import broker

    with working("a broker needs some 15 seconds", quiet=as_json):
        running = broker.start(directory, port, report=lambda line: None if as_json else print(line, flush=True))
    if as_json:
        print(json.dumps({"address": running.address, "pid": running.pid, "directory": str(running.directory)}))
        return
    print(f'Kafka answers on {running.address}; in a plan: [log] kafka = "{running.address}"')


@kafka.command()
def stop(directory: Directory = _HERE) -> None:
    """Stop the broker; its data stays."""
    from atoll.logs import broker

    print("stopped" if broker.stop(directory) else f"no broker runs in {directory}")
