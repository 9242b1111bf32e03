"""`atoll audit show|verify`: what a run's record says, and whether it is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import app
from atoll.cli.look import HERE, AsJson, Run, Store, open_store
from atoll.cli.show import working

audit = typer.Typer(help="The record of a run, which can't be changed unseen: look at it, and check it.", no_args_is_help=True)
app.add_typer(audit, name="audit")


@audit.command()
def show(run: Run = None, store: Store = HERE, as_json: AsJson = False) -> None:
    """Show what the record of a run says: who was let in, each round, what was refused, the end."""
    from atoll.chain import read

    base = open_store(store)
    found = base.find(run)
    links = base.links(found.run)
    said = read(links, found.run, found.plan_digest)
    if as_json:
        rows = [{**asdict(link), "entry": entry} for link, entry in zip(links, said)]
        print(json.dumps({"run": found.run, "plan": found.plan_digest, "key": said[0]["key"], "record": rows}))
        return
    names = {one["node"]: one["name"] for one in said if one["what"] == "admitted"}
    print(f"run {found.run}, signed by key {said[0]['key']}")
    for link, entry in zip(links, said):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at"]))
        told = "".join(sign if sign.isprintable() else " " for sign in _told(entry, names))  # a node's reason may hold anything
        print(f"{link.number:5}  {when}  {link.head[:12]}  {entry['what']:8}  {told}")


def _told(entry: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """An entry for people, in one line."""

    def called(node: str) -> str:
        return names.get(node, node)

    match entry["what"]:
        case "begun":
            return f"plan {entry['name']} ({entry['plan'][:12]}), model {entry['initial'][:12]}"
        case "admitted":
            return f"{entry['name']} ({entry['node']})"
        case "revoked":
            return called(entry["node"])
        case "opened":
            return f"round {entry['round']} attempt {entry['attempt']}: {', '.join(map(called, entry['cohort']))} are asked"
        case "closed":
            who = ", ".join(called(node) for node, _ in entry["accepted"])
            return f"round {entry['round']}: updates of {who} give model {entry['model'][:12]}"
        case "refused":
            return f"round {entry['round']}: {called(entry['node'])}: {entry['status']}: {entry['reason']}"
    return f"{entry['outcome']}: {entry['reason']}"


@audit.command()
def verify(
    run: Run = None,
    ledger: Annotated[
        list[Path] | None,
        typer.Option(help="The directory of a node that took part (repeat for more): its ledger knows what it was shown."),
    ] = None,
    store: Store = HERE,
    as_json: AsJson = False,
) -> None:
    """Check a run's record: its hashes and signatures, the stored history against it, and what nodes were shown of it.

    Without a node's ledger it finds whatever was changed by anybody without the server's key (server.key in the store).
    """
    from atoll.server import audit as auditing

    base = open_store(store)
    with working("checking", quiet=as_json):
        found = auditing.verify(store, base, base.find(run), ledger or ())
    if as_json:
        print(json.dumps(found._asdict()))
        return
    print(f"run {found.run}: all {found.entries} entries are whole and signed by key {found.key}")
    print(f"{found.rounds} rounds and {found.nodes} nodes are stored as it says")
    if ledger:
        print(f"{found.heads} heads in {found.ledgers} ledgers are its own")
    else:
        print("whether its server wrote it anew, only a node's ledger can say: give one with --ledger")
