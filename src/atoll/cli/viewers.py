"""`atoll viewers`: who may look at a server's runs, and who may act on them."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from atoll.cli import app
from atoll.cli.look import HERE, AsJson, Store
from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.store.viewers import Role

viewers = typer.Typer(
    help="Who may look at a server's page and figures: everybody, until the first is added; then only who has a token.",
    no_args_is_help=True,
)
app.add_typer(viewers, name="viewers")
Name = Annotated[str, typer.Argument(help="A name for whoever gets the token.")]


@viewers.command()
def add(
    name: Name,
    role: Annotated[str, typer.Option(help="viewer: may look; operator: may stop a run and revoke nodes, too.")] = "viewer",
    store: Store = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a token to look by, or to act by, and show it once; the server may be running."""
    from atoll.store.viewers import Role, Viewers

    if role not in get_args(Role):
        raise AtollError(f"--role: '{role}' is none; it is {' or '.join(get_args(Role))}")
    with closing(Viewers(store)) as found:
        token = found.add(name, cast("Role", role))
    if as_json:
        print(json.dumps({"name": name, "role": role, "token": token}))
        return
    print(f"token of {name}, shown this once: {token}")
    if role == "operator":
        print("ATOLL_STOP_TOKEN=… atoll stop ADDRESS; a browser takes viewers' tokens only")
    else:
        print("in a browser: the page asks for it; by command: ATOLL_STATUS_TOKEN=… atoll status ADDRESS")


@viewers.command("list")
def list_(store: Store = HERE, as_json: AsJson = False) -> None:
    """Show who may look, and who may act."""
    from atoll.store.viewers import Viewers

    with closing(Viewers(store)) as found:
        people = found.all()
    if as_json:
        print(json.dumps({"viewers": [{"name": one.name, "role": one.role, "added": one.added} for one in people]}))
        return
    for one in people:
        print(f"{one.name}, {one.role} since {time.strftime('%Y-%m-%d %H:%M', time.localtime(one.added))}")
    if not people:
        print("nobody was added: everybody who reaches the server may look; `atoll viewers add NAME` changes that")


@viewers.command()
def revoke(name: Name, store: Store = HERE, as_json: AsJson = False) -> None:
    """Let somebody look no more, within a second."""
    from atoll.store.viewers import Viewers

    with closing(Viewers(store)) as found:
        found.revoke(name)
    print(json.dumps({"name": name}) if as_json else f"{name} may look no more")
