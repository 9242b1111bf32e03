"""`atoll status`, `atoll history` and `atoll export`: look, and take away."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from atoll.cli import app
from atoll.cli.plot import curves, plot
from atoll.cli.reach import Ca, ClientCertificate, OperatorToken, Pin, ask
from atoll.cli.show import plainly, rounds_table, working
from atoll.errors import AtollError
from atoll.plan import Plan
from atoll.wire import Address

if TYPE_CHECKING:
    from atoll.store import UpdateRow
    from atoll.store.sql import SqlStore

Store = Annotated[Path, typer.Option(help="The server's store.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE:FUNCTION", help="Let plans run this function of this machine (repeat for more)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
HERE = Path("atoll-store")


def stored_runs(context: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of the stored runs, the newest first, for a shell's completion."""
    with contextlib.suppress(AtollError):
        runs = open_store(Path(context.params.get("store") or HERE)).runs()
        return [row.run for row in runs if row.run.startswith(incomplete)]
    return []


_ONE = "A run's id, or the start of it; the newest by default."
Run = Annotated[str | None, typer.Argument(help=_ONE, autocompletion=stored_runs)]


@app.command()
def status(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "http://127.0.0.1:8740",
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    token: Annotated[str | None, typer.Option(help="A viewer's token, as `atoll viewers add` showed it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a running server does, what it waits for, and which nodes are there."""
    from atoll.tls import Trust

    found = ask(url, "/v1/status", Trust(pin, ca, certificate), token)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    spent = f", ε {found['epsilon']:.3g} so far" if found.get("epsilon") is not None else ""
    console.print(f"run [bold]{found['run']}[/bold] of plan {found['plan']}: round {found['round']} of {found['rounds']}{spent}")
    console.print(f"{found['phase']}: {found['waiting_for']}", soft_wrap=True)
    for node in found["nodes"]:
        why = f": {node['reason']}" if "reason" in node else ""
        share = f" {node['received']} of {node['size']} bytes" if "size" in node else ""
        share += f", silent for {node['silent']:.0f} s: frozen, or cut off" if "silent" in node else ""
        if node["doing"] == "lost":
            share += f" {time.time() - node['since']:.0f} s ago" if "since" in node else ""
            share += ": it comes back by itself, or once it is started again there"
        doing = node["doing"].replace("_", " ")
        late = f" for round {node['round']}" if node.get("round", found["round"]) != found["round"] else ""
        console.print(f"  {node['name']}: {doing}{late}{share}{why}", markup=False, soft_wrap=True)


@app.command()
def stop(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "http://127.0.0.1:8740",
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    token: OperatorToken = None,
    as_json: AsJson = False,
) -> None:
    """End a server's run in order, from elsewhere: nodes are told, and everything is stored; it can be resumed."""
    from atoll.tls import Trust

    found = ask(url, "/v1/stop", Trust(pin, ca, certificate), token, "POST")
    print(
        json.dumps(found) if as_json else f"run {found['run']} ends: its nodes are told; `atoll serve --resume` goes on with it"
    )


@app.command()
def history(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Runs' ids, or the start of them; the newest by default.", autocompletion=stored_runs
        ),
    ] = None,
    store: Store = HERE,
    as_json: AsJson = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw the curves of the runs into this picture: .png, .svg or .pdf.")
    ] = None,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Show only the updates that were refused: whose, why, and where their bytes lie.")
    ] = False,
) -> None:
    """Show what is stored of a run, or of several: each round, who answered, how its model does."""
    base = open_store(store)
    if rejected:
        _show_rejected(base, store, runs or [None], as_json=as_json)
        return
    found = [base.history(run) for run in runs or [base.find().run]]
    if picture:
        with working("drawing", quiet=as_json):
            title = f"{found[0]['name']}, run {found[0]['run']}" if len(found) == 1 else ""
            plot(curves(found), picture, title, asked=found[0]["metrics"])
    for one in found:
        for row in one["rounds"]:
            row["judged"] = row["holdout"] or row["nodes"]
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else {"runs": found}))
        return
    for one in found:
        _show(one)
    if picture:
        print(f"plot: {picture}")


def _show_rejected(base: SqlStore, store: Path, runs: Sequence[str | None], *, as_json: bool) -> None:
    found = {}
    for run in (base.find(one).run for one in runs):
        names = {row.node: row.name for row in base.nodes(run)}
        found[run] = [_told(store, row, names.get(row.node, row.node)) for row in base.updates(run) if row.status == "rejected"]
    if as_json:
        listed = [{"run": run, "rejected": rows} for run, rows in found.items()]
        print(json.dumps(listed[0] if len(listed) == 1 else {"runs": listed}))
        return
    console = Console()
    for run, rows in found.items():
        console.print(f"run [bold]{run}[/bold]: {len(rows)} updates were refused", soft_wrap=True)
        for row in rows:
            where = f"; kept as {row['file']}" if row["file"] else ""
            said = f"  round {row['round']}.{row['attempt']}: {row['name']}: update {row['digest'][:12]}: {row['reason']}{where}"
            console.print(said, markup=False, soft_wrap=True)


def _told(store: Path, row: UpdateRow, name: str) -> dict[str, Any]:
    from atoll.server import quarantine

    path = quarantine.path_of(store, Address(row.run, row.round, row.attempt, row.node), row.digest)
    facts = ("round", "attempt", "node", "digest", "bytes", "norm", "reason")
    return {
        **{fact: getattr(row, fact) for fact in facts},
        "name": name,
        "offence": bool(row.offence),
        "file": str(path) if path.exists() else None,
    }


def _show(found: dict[str, Any]) -> None:
    console = Console()
    console.print(f"run [bold]{found['run']}[/bold] of plan {found['name']}: {found['outcome']}. {found['reason']}")
    if found["rounds"]:
        console.print(rounds_table(found["rounds"], found["planned"], "", found["metrics"]))
        for node, judged in sorted(found["rounds"][-1]["by_node"].items()):
            console.print(f"  {node}, on its own rows: {plainly(judged)}", soft_wrap=True)
    for row in found["rounds"]:
        for refused in row["refused"]:
            console.print(f"  round {row['round']}: {refused['name']}: {refused['status']}: {refused['reason']}", soft_wrap=True)
    if found["best"]:
        console.print(f"best model {found['best'][:12]}, last {found['last'][:12]}")


@app.command()
def export(
    to: Annotated[
        Path,
        typer.Option(help="The file: its ending says which kind, .safetensors, .keras or, for trees, .json as XGBoost has it."),
    ],
    run: Run = None,
    store: Store = HERE,
    which: Annotated[str, typer.Option(help="best, last, or the number of a round.")] = "best",
) -> None:
    """Write a run's model to a file."""
    base = open_store(store)
    found = base.history(run)
    digest = _digest(found, which)
    from atoll.store.models import Models

    models = Models(store / "models")
    if not models.has(digest) and which not in ("best", "last"):
        raise AtollError(f"model {digest[:12]} of run {found['run']} was pruned; best and last are kept as long as the run is")
    path, plan = models.path(digest), Plan.from_json(base.find(found["run"]).plan)
    if to.suffix == ".safetensors":
        try:
            _copy(plan, path, to)
        except OSError as error:
            raise AtollError(f"{to}: can't be written ({error.strerror})") from error
    elif to.suffix in _KINDS:
        with working(f"writing the {_KINDS[to.suffix][1]}"):
            _export(plan, path, to)
    else:
        raise AtollError(f"{to}: the ending says the kind, and '{to.suffix}' is none: use .safetensors, {' or '.join(_KINDS)}")
    print(f"{to}: model {digest[:12]} of run {found['run']}")


def _digest(found: dict[str, Any], which: str) -> str:
    rounds = {str(row["round"]): row["model"] for row in found["rounds"]}
    named = {"best": found["best"] or found["last"], "last": found["last"], **rounds}
    if which not in named:
        raise AtollError(f"--which: '{which}' is none of best, last and the rounds 1 to {len(rounds)}")
    return str(named[which])


def _copy(plan: Plan, path: Path, to: Path) -> None:
    from atoll import compression

    if compression.down(plan).small:
        to.write_bytes(_whole(plan, path))
    else:
        shutil.copyfile(path, to)


def _whole(plan: Plan, path: Path) -> bytes:
    """Return the bytes of a model's file, opened where the plan made it small."""
    from atoll import compression
    from atoll.wire import layouts_read, pack, unpack, words_of

    body, down = path.read_bytes(), compression.down(plan)
    if not down.small:
        return body
    layouts = layouts_read(words_of(body)["whole"])
    return b"".join(pack(down.received(unpack(body, down.layouts(layouts))[0], layouts)))


_KINDS = {".keras": ("keras", "Keras model"), ".json": ("trees", "ensemble of trees")}
"""Endings of what a framework reads: of which kind of model, and in words."""


def _export(plan: Plan, path: Path, to: Path) -> None:
    kind, said = _KINDS[to.suffix]
    if plan.model.kind != kind:
        raise AtollError(f"{to}: the run's model is no {said} but {plan.model.kind}; export it as .safetensors")
    from atoll import learners, method
    from atoll.vector import layouts_of
    from atoll.wire import unpack

    learner = learners.build(plan.with_(model={"metrics": plan.model.known_metrics}))
    algorithm = method.find(plan, learner)
    sent = layouts_of(algorithm.brief(algorithm.init(learner.initial(0))))  # what a method has beside the model, too
    groups = unpack(_whole(plan, path), sent)[0]
    if kind == "keras":
        from atoll.learners.keras import export as write_keras

        write_keras(plan, groups, to)
    else:
        from atoll.learners.trees import export as write_trees

        write_trees(plan, groups, to)


def open_store(store: Path) -> SqlStore:
    """Open a server's store to look at it.

    Raises:
        AtollError: there is none.
    """
    from atoll.store.sql import SqlStore

    if not (store / "atoll.sqlite").exists():
        raise AtollError(f"{store}: no store is there; name the server's with --store")
    return SqlStore(store)
