"""`atoll keys` and `atoll nodes`: who a node is, and whom a server lets in."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import HERE, AsJson, Store
from atoll.cli.reach import Ca, ClientCertificate, OperatorToken, Pin, ask
from atoll.errors import AtollError

keys = typer.Typer(help="A node's key, which makes it who it is.", no_args_is_help=True)
nodes = typer.Typer(
    help="Whom a server lets in: everybody, until the first name is added; then only who is on the list.", no_args_is_help=True
)
app.add_typer(keys, name="keys")
app.add_typer(nodes, name="nodes")
Name = Annotated[str, typer.Argument(help="The node's name, as in its `atoll join --name NAME`.")]


@keys.command()
def new(
    directory: Annotated[Path, typer.Option("--dir", help="The node's directory, as for join.")] = Path("atoll-node"),
    as_json: AsJson = False,
) -> None:
    """Make a node's Ed25519 key, readable by its owner only, and show its id; without one `atoll join` makes it."""
    from atoll.keys import Identity

    path = directory / "node.key"
    if path.exists():
        node = Identity.at(path).node
        raise AtollError(f"{path}: holds the key of node {node} already; name another --dir, or move it away")
    identity = Identity.at(path)
    if as_json:
        print(json.dumps({"node": identity.node, "key": identity.public.hex(), "file": str(path)}))
        return
    print(f"node {identity.node}\nkey file: {path} (keep it: who holds it is this node)")


@keys.command("certificate")
def certificate_(
    name: Annotated[str, typer.Argument(help="Whose it is: a node's name, or a person's.")],
    to: Annotated[Path, typer.Option(help="The file: key and certificate in PEM, readable by its owner only.")],
    store: Store = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a key and its certificate by the CA of a server's store, for `atoll serve --client-certificates` to let in."""
    from atoll import tls

    if to.exists():
        raise AtollError(f"{to}: is there already; name another file with --to")
    tls.pair(store / "tls", name, to)
    if as_json:
        print(json.dumps({"name": name, "file": str(to)}))
        return
    print(f"{to}: only {name} may have it; there: atoll join URL --certificate {to.name} --data FILE")


@nodes.command()
def add(name: Name, store: Store = HERE, as_json: AsJson = False) -> None:
    """Add a name, and show the token that its node joins with, once; the server may be running."""
    from atoll.messages import NAME
    from atoll.store.enrolment import Enrolment

    if not re.fullmatch(NAME, name):
        raise AtollError(f"'{name}' is no name of a node: letters, digits, '.', '_', '-', at most 64")
    with closing(Enrolment(store)) as enrolment:
        token = enrolment.add(name)
    if as_json:
        print(json.dumps({"name": name, "token": token}))
        return
    print(f"token of {name}, shown this once: {token}")
    print(f"on its machine: ATOLL_JOIN_TOKEN=… atoll join URL --name {name} --data FILE   (the token only the first time)")


@nodes.command("list")
def list_(store: Store = HERE, as_json: AsJson = False) -> None:
    """Show who may join: invited (the token is not used yet), joined, revoked."""
    from atoll.store.enrolment import Enrolment

    with closing(Enrolment(store)) as enrolment:
        found = enrolment.all()
    if as_json:
        told = ("name", "state", "node", "added", "joined", "revoked")
        print(json.dumps({"nodes": [{fact: getattr(one, fact) for fact in told} for one in found]}))
        return
    if not found:
        print("nobody was added: the server lets everybody in; `atoll nodes add NAME` changes that")
        return
    table = Table("name", "state", "node", "added")
    for one in found:
        table.add_row(one.name, one.state, one.node or "", time.strftime("%Y-%m-%d %H:%M", time.localtime(one.added)))
    Console().print(table)


@nodes.command()
def revoke(
    name: Name,
    store: Store = HERE,
    server: Annotated[
        str | None, typer.Option(help="From elsewhere: the address of the running server, instead of --store.")
    ] = None,
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    token: OperatorToken = None,
    as_json: AsJson = False,
) -> None:
    """Let a node in no more: a running server parts with it within a second, and the round goes on without it."""
    from atoll.store.enrolment import Enrolment
    from atoll.tls import Trust

    if server:
        asked = ask(server, f"/v1/nodes/{quote(name, safe='')}/revoke", Trust(pin, ca, certificate), token, "POST")
        node = asked.get("node")
    else:
        with closing(Enrolment(store)) as enrolment:
            node = enrolment.revoke(name).node
    if as_json:
        print(json.dumps({"name": name, "node": node}))
        return
    print(f"{name} is revoked" + (f" (node {node})" if node else "; its token was never used"))
