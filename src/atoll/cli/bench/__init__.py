"""`atoll bench`: the field's workloads on this machine, beside floors measured in the same run.

A floor is the least that any system must do for the same result, written by hand without any of Atoll.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from atoll.cli import app
from atoll.cli.show import working

bench = typer.Typer(help="The field's workloads on this machine, beside floors in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Log = Annotated[str, typer.Option(help="embedded or kafka.")]


@bench.command()
def aggregate(
    updates: Annotated[int, typer.Option(help="How many updates.")] = 20,
    parameters: Annotated[int, typer.Option(help="float32 numbers in each.")] = 25_000_000,
    rule: Annotated[str, typer.Option(help="fedavg, median, trimmed_mean, krum, …: any aggregation.rule for models.")] = "fedavg",
    as_json: AsJson = False,
) -> None:
    """Time the weighted mean of large updates, or another rule over them, against numpy's mean in place."""
    from atoll.cli.bench.aggregate import measure

    with working("adding up", quiet=as_json):
        row = measure(updates, parameters, rule)
    _show(row, f"aggregate, {rule}", as_json=as_json)


@bench.command()
def verify(
    parameters: Annotated[int, typer.Option(help="float32 numbers in the update.")] = 25_000_000,
    as_json: AsJson = False,
) -> None:
    """Time what an update goes through before it counts: signature, digest, layout, finite numbers, norm."""
    from atoll.cli.bench.verify import measure

    with working("checking", quiet=as_json):
        row = measure(parameters)
    _show(row, "verify", as_json=as_json)


@bench.command()
def compress(
    parameters: Annotated[int, typer.Option(min=4, help="float32 numbers in the update.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Time each stage of compression: GB of float32 a second in and out, and bytes a number, beside a plain copy."""
    from atoll.cli.bench.compress import measure

    with working("compressing", quiet=as_json):
        rows = measure(parameters)
    if as_json:
        print(json.dumps({"rows": rows}), flush=True)
        return
    for row in rows:
        _show(row, row["method"], as_json=False)


@bench.command()
def rounds(
    nodes: Annotated[int, typer.Option(help="How many node processes.")] = 10,
    parameters: Annotated[int, typer.Option(help="float32 numbers in the model.")] = 1_000_000,
    count: Annotated[int, typer.Option("--rounds", help="How many rounds; the first is not counted.")] = 12,
    log: Log = "embedded",
    floor: Annotated[bool, typer.Option(help="Also run the floor, whose nodes take three models of memory each.")] = True,
    turns: Annotated[
        bool, typer.Option("--without-checks", help="Leave signatures, checks and the record out of two of three rounds.")
    ] = False,
    secure: Annotated[
        int | None,
        typer.Option(min=32, max=64, help="Add updates up under masks, in numbers of 32 or 64 bits; plain rounds come first."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time whole rounds over real processes without training, against a floor of bare parts."""
    from atoll.cli.bench.rounds import measure

    with working("running rounds", quiet=as_json):
        row = measure(nodes, parameters, count, log, floor=floor, turns=turns, bits=secure)
    _show(row, f"rounds, {log} log", as_json=as_json)


@bench.command()
def growth(
    log: Log = "embedded",
    others: Annotated[
        Path | None, typer.Option("--beside", help="Lines of JSON of other systems: name, nodes, parameters, s_per_round.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw it into this picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time rounds with 2 to 200 nodes and with 10⁴ to 10⁸ parameters: some ten minutes, and 10 GB of memory."""
    from atoll.cli.bench.growth import beside, grow, plot

    rows = beside(others) if others else []
    for row in grow(log):  # each is shown as it comes
        rows.append(dict(row))
        _show(row, f"rounds, {log} log", as_json=as_json)
        if picture:
            plot(rows, picture)
    if as_json:
        print(json.dumps({"rows": rows}), flush=True)


@bench.command()
def connect(
    nodes: Annotated[int, typer.Option(help="How many nodes; each takes an open file, here and in the server.")] = 10_000,
    idle: Annotated[float, typer.Option(help="For how many seconds the idle server is measured.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Connect many idle nodes to one server process: memory and processor time of each, and the time to reach all of them."""
    from atoll.cli.bench.connect import measure

    with working("connecting nodes", quiet=as_json):
        row = measure(nodes, idle)
    _show(row, "connect", as_json=as_json)


@bench.command()
def privacy(
    nodes: Annotated[list[int] | None, typer.Option(help="How many nodes; may be given again. Default 10, 20 and 100.")] = None,
    parameters: Annotated[int, typer.Option(help="float32 numbers in an update.")] = 1_000_000,
    bits: Annotated[int, typer.Option(help="32 or 64 for each number.")] = 32,
    dropout: Annotated[float, typer.Option(help="The fraction that is lost after it gave its shares.")] = 0.1,
    corrupt: Annotated[float, typer.Option(help="The fraction that may work for the server.")] = 0.1,
    other: Annotated[
        str | None,
        typer.Option("--beside", help="A command that takes nodes, parameters, lost and threshold, and prints a row of JSON."),
    ] = None,
    clock: Annotated[str, typer.Option(help="wall, or processor: what to count on a busy machine.")] = "wall",
    encryption: Annotated[bool, typer.Option(help="Also time encrypted sums, for which TenSEAL must be there.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time secure sums, encrypted sums and noise: a node's and the server's work, and bytes, beside the plain update."""
    from atoll.cli.bench import encrypted, noised
    from atoll.cli.bench.privacy import CLOCKS, beside, measure

    rows = []
    for count in nodes or [10, 20, 100]:
        with working(f"summing over {count} nodes", quiet=as_json):
            found = measure(count, parameters, bits, dropout, corrupt, clock)
            if other:
                found.append(beside(other, found[-1], dropout, corrupt, clock))
            if encryption:
                found.append(encrypted.measure(count, parameters, dropout, int(corrupt * count + 1e-9), CLOCKS[clock]))
            found += noised.measure(count, parameters, CLOCKS[clock])
        for row in found:
            rows.append(row)
            if not as_json:
                _show(row, row["guard"], as_json=False)
    if as_json:
        print(json.dumps({"rows": rows}), flush=True)


@bench.command()
def simulate(
    repeat: Annotated[int, typer.Option(min=1, help="How often each program runs, in turn; medians are told.")] = 1,
    floor: Annotated[bool, typer.Option(help="Also run the floor of s, JAX by hand over two host devices.")] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="s, lr, million or growth; may be given again. Without: all of them, in a minute.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the simulator: workload S from command to end; a linear model on 1,000 clients; on up to a million; by cohort."""
    from atoll.cli.bench.simulate import WORKLOADS, measure

    with working("simulating", quiet=as_json):
        row = measure(repeat, floor=floor, only=only or ())
    if as_json:
        print(json.dumps(row), flush=True)
        return
    if fixed := {name: value for name, value in row.items() if name not in WORKLOADS}:
        _show(fixed, "simulate, workload S", as_json=False)
    for name in WORKLOADS:
        found = row.get(name, [])
        for one in found if isinstance(found, list) else [found]:
            _show(one, f"simulate, {name}", as_json=False)


@bench.command(name="all")
def everything(as_json: AsJson = False) -> None:
    """Run every benchmark: a few minutes."""
    aggregate(as_json=as_json)
    verify(as_json=as_json)
    simulate(as_json=as_json)
    for log in ("embedded", "kafka"):
        rounds(log=log, as_json=as_json)


def _show(figures: Mapping[str, Any], title: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures), flush=True)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
