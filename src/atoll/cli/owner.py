"""`atoll plan` and `atoll policy`: what a plan would take from a node, and what its owner agrees to."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from atoll.cli import app
from atoll.cli.look import Allow, AsJson
from atoll.cli.reach import Ca, ClientCertificate, Pin, ask
from atoll.cli.show import working
from atoll.cli.taking import taken, words
from atoll.errors import AtollError, PolicyError, RefusedError
from atoll.plan import Plan

if TYPE_CHECKING:
    from atoll.tls import Trust

plan = typer.Typer(help="What a plan would take from a node.", no_args_is_help=True)
policy = typer.Typer(help="What the owner of a node's data agrees to.", no_args_is_help=True)
app.add_typer(plan, name="plan")
app.add_typer(policy, name="policy")
Agreed = Annotated[str, typer.Argument(metavar="PLAN|URL", help="A plan's file, or the address of a server that runs one.")]


@plan.command("show")
def show_(
    agreed: Agreed,
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Say in plain words what a plan would take from a node: what is read, what leaves and how often, who sees it."""
    from atoll.tls import Trust

    found = read(agreed, Trust(pin, ca, certificate))
    if as_json:
        print(json.dumps(taken(found, allow or ())))
        return
    _say(found, Console(), allow or ())


@policy.command("new")
def new_policy(
    file: Annotated[Path, typer.Argument(help="Where to write; it must be new.")] = Path("policy.toml"),
) -> None:
    """Write a policy to start from, in which every line is explained."""
    if file.exists():
        raise AtollError(f"{file}: is there already; name another file, so that nothing is overwritten")
    try:
        file.write_bytes((files("atoll.cli") / "policy.toml").read_bytes())
    except OSError as error:
        raise AtollError(f"{file}: can't be written ({error.strerror})") from error
    print(f"{file}: read it, change it, then `atoll join URL --data FILE --policy {file}`")


@policy.command("check")
def check_policy(
    file: Annotated[Path, typer.Argument(help="The policy.")],
    agreed: Annotated[
        str | None, typer.Argument(metavar="[PLAN|URL]", help="A plan's file, or a server's address, to hold it against.")
    ] = None,
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    as_json: AsJson = False,
) -> None:
    """Check a policy file, and whether it lets a plan in; exit code 2 where it doesn't."""
    from atoll.node.policy import Policy, refuses
    from atoll.tls import Trust

    mine = Policy.load(file)
    found = read(agreed, Trust(pin, ca, certificate)) if agreed else None
    why = refuses(mine, found, None, time.time()) if found else None
    if as_json:
        print(json.dumps({"policy": mine.model_dump(mode="json"), "plan": found and found.digest, "refused": why}))
    elif found and not why:
        print(f"{file}: plan {found.plan.name} ({found.digest}) may be taken part in; each round is held against it as well")
    elif not found:
        print(f"{file}: is a policy; name a plan or a server to hold it against one")
    if why:
        raise PolicyError(f"{file}: {why}")


def read(agreed: str, trust: Trust) -> Plan:
    """Read a plan from a file, or from the server that runs it.

    Raises:
        AtollError: there is none.
    """
    if "://" not in agreed:
        return Plan.load(agreed)
    offer = ask(agreed, "/v1/plan", trust)
    if not isinstance(offer.get("plan"), dict):
        raise AtollError(f"{agreed}: no plan is served there; name a server's address, such as http://127.0.0.1:8740")
    return Plan.of(offer["plan"], source=f"{agreed}: plan")


def consent(url: str, trust: Trust, policy_file: Path, directory: Path, allow: list[str] | None) -> str | None:
    """Ask whoever sits at the terminal about a server's plan, where the policy says so and nobody agreed before.

    Returns:
        The digest of the plan that was agreed to; None where there was nothing to ask.

    Raises:
        RefusedError: the answer was no.
    """
    from atoll.node.policy import Policy, refuses
    from atoll.store.ledger import Ledger

    mine = Policy.load(policy_file)
    if mine.plans != "ask" or not sys.stdin.isatty():
        return None
    found = read(url, trust)
    ledger = Ledger(directory)
    try:
        if ledger.agreed(found.digest) or refuses(mine, found, None, time.time()):  # the node says why
            return None
        _say(found, Console(stderr=True), allow or [])
        if not typer.confirm("Take part in this plan?", err=True):
            raise RefusedError(f"plan {found.plan.name} ({found.digest[:12]}): its owner said no; nothing was sent")
        ledger.agree(found.digest, found.plan.name, time.time())
    finally:
        ledger.close()
    return found.digest


def _say(found: Plan, console: Console, allow: Collection[str]) -> None:
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(max_width=100, overflow="fold")
    with working("looking at the model"):
        facts = taken(found, allow)
    for heading, said in words(facts):
        table.add_row(heading, said)
    console.print(Padding(table, (1, 0, 0, 0)), markup=False)
