"""`atoll prune` and `atoll replay`: let go of what is not needed, and prove that what is kept is whole."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import HERE, Allow, AsJson, Run, Store, open_store, stored_runs
from atoll.cli.reach import KafkaConfig
from atoll.cli.show import size
from atoll.errors import AtollError, StoreError
from atoll.plan import Plan

if TYPE_CHECKING:
    from atoll.server.retention import Use
    from atoll.store import RunRow
    from atoll.store.sql import SqlStore


@app.command()
def prune(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs to let go, by id or its start.", autocompletion=stored_runs)
    ] = None,
    keep: Annotated[int | None, typer.Option(min=0, help="Let go of all runs that ended but the newest so many.")] = None,
    older: Annotated[float | None, typer.Option("--older-than", min=0, help="Also of those that ended so many days ago.")] = None,
    models: Annotated[
        bool, typer.Option("--models", help="Of the runs kept, keep only initial, best and last model: replay gives the others.")
    ] = False,
    topic: Annotated[
        bool, typer.Option("--topic", help="Have Kafka drop what lies before the oldest run kept; if no other store uses it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also let go of a named run that never ended: its server died.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    kafka_config: KafkaConfig = None,
    store: Store = HERE,
    as_json: AsJson = False,
) -> None:
    """Let go of runs' updates and models to free disk; histories stay, and so does all that replay of a kept run needs.

    Without a run, --keep, --older-than or --models it shows what each run takes, and removes what no run names.
    """
    from atoll.server import retention

    base = open_store(store)
    before = retention.uses(store, base)
    there = [one.row for one in before if one.row.pruned is None]
    gone = _chosen(there, runs or [], keep, older, force=force)
    thinned = [row.run for row in there if models and row.run not in gone and row.outcome != "running"]
    freed = retention.prune(store, base, gone, thinned, dry=dry)
    if topic and not dry:
        _drop(base, kafka_config)
    if as_json:
        print(json.dumps({"gone": gone, "thinned": thinned, "freed": freed, "dry": dry}))
        return
    Console().print(_table(before, gone, thinned))
    print(f"{'would free' if dry else 'freed'} {size(freed)}")


def _chosen(there: Sequence[RunRow], named: Sequence[str], keep: int | None, older: float | None, *, force: bool) -> list[str]:
    """The runs to let go, the newest first."""
    gone = set()
    for name in named:
        found = [row for row in there if row.run.startswith(name)]
        if len(found) != 1:
            many = "several runs start" if found else "no run whose files are here starts"
            raise AtollError(f"{many} with '{name}'; there are: {', '.join(row.run for row in there[:10]) or 'none'}")
        if found[0].outcome == "running" and not force:
            raise AtollError(f"run {found[0].run} hasn't ended; stop its server first, or give --force if that died")
        gone.add(found[0].run)
    ended = [row for row in there if row.outcome != "running"]
    if keep is not None:
        gone |= {row.run for row in ended[keep:]}
    if older is not None:
        gone |= {row.run for row in ended if (row.ended or 0) < time.time() - older * 86400}
    return [row.run for row in there if row.run in gone]


def _drop(base: SqlStore, kafka_config: Path | None) -> None:
    """Have Kafka drop what no kept run needs: in each partition all before the oldest kept run, or all where none is kept."""
    from atoll.logs import access, topics

    known_by = access.read(kafka_config)
    runs: dict[tuple[str, str], list[RunRow]] = {}
    for row in base.runs():
        log = Plan.from_json(row.plan).log
        if log.kafka:
            runs.setdefault((log.kafka, log.topic), []).append(row)
    for (servers, topic), rows in runs.items():
        began = {row.run: _began(base, row) for row in rows}
        kept = [began[row.run] for row in rows if row.pruned is None]
        # A partition that a kept run doesn't know of came later: all that is in it may be that run's.
        keys = dict.fromkeys(key for one in began.values() for key in one)
        topics.let_go(servers, topic, {key: min((one.get(key, 0) for one in kept), default=-1) for key in keys}, known_by)
        print(f"topic {topic}: Kafka keeps what lies from the oldest kept run on", file=sys.stderr)


def _began(base: SqlStore, row: RunRow) -> dict[str, int]:
    """Where a run begins: in a node's topic that came later, at its beginning."""
    from atoll.logs import topics

    later = {f"{one.node}/0": 0 for one in base.nodes(row.run)} if Plan.from_json(row.plan).log.apart else {}
    return later | dict(map(topics.place, (row.log_start or "").split()))


def _table(before: Sequence[Use], gone: Sequence[str], thinned: Sequence[str]) -> Table:
    table = Table(header_style="bold")
    for name in ("run", "plan", "outcome"):
        table.add_column(name, overflow="fold")
    for name in ("updates", "models", ""):
        table.add_column(name, justify="right")
    for one in before:
        row = one.row
        fate = "pruned" if row.pruned else "goes" if row.run in gone else "models go" if row.run in thinned else "stays"
        table.add_row(row.run, row.name, row.outcome, size(one.updates), size(one.models), fate)
    return table


@app.command()
def replay(
    run: Run = None,
    store: Store = HERE,
    allow: Allow = None,
    kafka_config: KafkaConfig = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every global model of a run from the updates in its log, and compare digests."""
    asyncio.run(_replay(run, store, allow or (), kafka_config, as_json=as_json))


async def _replay(run: str | None, store: Path, allow: Sequence[str], kafka_config: Path | None, *, as_json: bool) -> None:
    from atoll.logs import access
    from atoll.server.replay import replay as again

    base = open_store(store)
    found, rounds = base.find(run), 0
    async for one in again(store, base, found, allow=allow, access=access.read(kafka_config)):
        if one.found != one.stored:
            raise StoreError(
                f"run {found.run}: round {one.round}: its {one.updates} updates give model {one.found[:12]}, "
                f"but {one.stored[:12]} is stored: the history, an update or the initial model was altered"
            )
        rounds += 1
        if not as_json:
            print(f"round {one.round}: {one.updates} updates give model {one.found[:12]}, as stored", flush=True)
    if as_json:
        print(json.dumps({"run": found.run, "rounds": rounds, "same": True}))
    else:
        print(f"run {found.run}: all {rounds} rounds give the stored models")
