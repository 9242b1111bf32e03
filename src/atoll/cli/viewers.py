"""`atoll viewers`: who may look at a server's runs."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import Annotated

import typer

from atoll.cli import app
from atoll.cli.look import HERE, AsJson, Store

viewers = typer.Typer(
    help="Who may look at a server's page and figures: everybody, until the first is added; then only who has a token.",
    no_args_is_help=True,
)
app.add_typer(viewers, name="viewers")
Name = Annotated[str, typer.Argument(help="A name for whoever gets the token.")]


@viewers.command()
def add(name: Name, store: Store = HERE, as_json: AsJson = False) -> None:
    """Make a token to look by, and show it once; the server may be running."""
    from atoll.store.viewers import Viewers

    with closing(Viewers(store)) as found:
        token = found.add(name)
    if as_json:
        print(json.dumps({"name": name, "token": token}))
        return
    print(f"token of {name}, shown this once: {token}")
    print("in a browser: ADDRESS/?token=… the first time; by command: ATOLL_STATUS_TOKEN=… atoll status ADDRESS")


@viewers.command("list")
def list_(store: Store = HERE, as_json: AsJson = False) -> None:
    """Show who may look."""
    from atoll.store.viewers import Viewers

    with closing(Viewers(store)) as found:
        people = found.all()
    if as_json:
        print(json.dumps({"viewers": [{"name": name, "added": added} for name, added in people.items()]}))
        return
    for name, added in people.items():
        print(f"{name}, since {time.strftime('%Y-%m-%d %H:%M', time.localtime(added))}")
    if not people:
        print("nobody was added: everybody who reaches the server may look; `atoll viewers add NAME` changes that")


@viewers.command()
def revoke(name: Name, store: Store = HERE, as_json: AsJson = False) -> None:
    """Let somebody look no more, within a second."""
    from atoll.store.viewers import Viewers

    with closing(Viewers(store)) as found:
        found.revoke(name)
    print(json.dumps({"name": name}) if as_json else f"{name} may look no more")
