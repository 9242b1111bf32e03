"""`atoll doctor`: what is here, what is missing and how to get it; whole in a bug report, for it shows no data and no secret."""

from __future__ import annotations

import contextlib
import ctypes
import email.utils
import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterator
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atoll import __version__, memory
from atoll.cli import app
from atoll.cli.look import HERE
from atoll.cli.reach import Ca, ClientCertificate, KafkaConfig, Pin, asked
from atoll.cli.show import size, working
from atoll.errors import AtollError
from atoll.plan import Plan
from atoll.tls import Trust

_NAME = "atoll-fl"
_PATIENCE = 5.0
"""Seconds until what doesn't answer counts as away."""
_ROOM = 1 << 30
"""A store with less room than this is close to full, in bytes."""
_OLD_KERNELS = ("Generic", "Prescott", "Core2", "Penryn", "Nehalem", "Katmai", "Coppermine", "Northwood", "Atom")
_STYLES = {"fine": "green", "absent": "dim", "note": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """What was looked at, how it is (`fine`, `absent`, `note`, `problem`), and what to say of it."""

    what: str
    state: str
    said: str


@app.command()
def doctor(
    plan: Annotated[Path | None, typer.Argument(help="A plan: can it be carried out here?")] = None,
    server: Annotated[str | None, typer.Option(help="A server's address: does it answer, and does its clock agree?")] = None,
    kafka: Annotated[str | None, typer.Option(help="A broker's host:port; by default the plan's.")] = None,
    kafka_config: KafkaConfig = None,
    pin: Pin = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    store: Annotated[Path, typer.Option(help="Where a server's store is, or will be.")] = HERE,
    port: Annotated[int, typer.Option(help="The port that a server would listen on.")] = 8740,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine: versions, optional parts, port, broker, disk, clock, processors and memory. No data, no secrets."""
    with working("looking", quiet=as_json):
        findings = list(_findings(plan, store, port, (kafka, kafka_config), (server, Trust(pin, ca, certificate))))
    problems = sum(one.state == "problem" for one in findings)
    if as_json:
        print(json.dumps({"problems": problems, "findings": [one._asdict() for one in findings]}))
    else:
        table = Table.grid(padding=(0, 2))
        for one in findings:
            table.add_row(Text(one.what), Text(one.state, _STYLES[one.state]), Text(one.said, overflow="fold"))
        Console().print(table)
    if problems:
        raise AtollError(f"{problems} problem{'s' if problems > 1 else ''} found")


def _findings(
    plan: Path | None, store: Path, port: int, broker: tuple[str | None, Path | None], server: tuple[str | None, Trust]
) -> Iterator[Finding]:
    yield Finding("atoll", "fine", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from _parts()
    yield from _programs()
    yield _processors()
    yield _kernels()
    yield _clock()
    yield _disk(store)
    yield _port(port)
    kafka, kafka_config = broker
    if plan:
        agreed, finding = _plan(plan)
        yield finding
        kafka = kafka or (agreed.log.kafka if agreed else None)
    if kafka:
        yield _broker(kafka, kafka_config)
    url, trust = server
    if url:
        yield from _server(url, trust)


def _parts() -> Iterator[Finding]:
    """The packages that Atoll needs, and those of each extra."""
    try:
        required = metadata.requires(_NAME) or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", f"{_NAME} isn't installed but run from its source: what it needs can't be told")
        return
    parts: dict[str, list[str]] = {}
    for line in required:
        if match := re.match(r"[A-Za-z0-9._-]+", line):
            said = re.search(r"extra == ['\"]([^'\"]+)", line)
            parts.setdefault(said[1] if said else "", []).append(match[0])
    for extra, names in parts.items():
        if extra in ("demo", "dev"):
            continue
        there = {name: _version(name) for name in names if not (name == "uvloop" and os.name == "nt")}
        if missing := [name for name, version in there.items() if version is None]:
            how = f"pip install '{_NAME}[{extra}]'" if extra else f"pip install {_NAME}"
            yield Finding(f"[{extra}]" if extra else "core", "absent" if extra else "problem", f"{', '.join(missing)}: {how}")
        else:
            yield Finding(f"[{extra}]" if extra else "core", "fine", ", ".join(f"{name} {there[name]}" for name in there))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _programs() -> Iterator[Finding]:
    for name, use in (("java", "atoll kafka start"), ("mvn", "the first `atoll kafka start`")):
        found = shutil.which(name)
        yield Finding(name, "fine" if found else "absent", found or f"only {use} needs it")


def _processors() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = memory.total()
    said = f"{usable} processors; " + (f"{size(total)} of memory" if total else "the system doesn't tell its memory")
    return Finding("machine", "note" if total and total < 1 << 30 else "fine", said)


def _kernels() -> Finding:
    """Which kernels numpy's OpenBLAS has chosen: another choice gives other last bits, and an old one is slow."""
    chosen = _openblas()
    if chosen is None:
        return Finding("numpy", "fine", "multiplies by another library than OpenBLAS")
    asked = os.environ.get("OPENBLAS_CORETYPE")
    said = f"OpenBLAS kernels {chosen}" + (f", as OPENBLAS_CORETYPE={asked} asks" if asked else "")
    flags = _flags()
    if chosen in _OLD_KERNELS and "avx2" in flags:
        better = "SkylakeX" if "avx512f" in flags else "Haswell"
        return Finding("numpy", "note", f"{said}: it doesn't know this processor and is slow; set OPENBLAS_CORETYPE={better}")
    return Finding("numpy", "fine", said)


def _openblas() -> str | None:
    import numpy as np

    np.ones((2, 2)) @ np.ones((2, 2))
    with contextlib.suppress(OSError):
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line}
        for path in loaded:
            library = ctypes.CDLL(path)
            for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
                if ask := getattr(library, name, None):
                    ask.restype = ctypes.c_char_p
                    return str(ask().decode())
    return None


def _flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        if match := re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return frozenset(match[1].split())
    return frozenset()


def _clock() -> Finding:
    now = time.time()
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime - 86400:
        return Finding("clock", "problem", f"{said}: that is before this program was installed; set the clock")
    return Finding("clock", "fine", said)


def _disk(store: Path) -> Finding:
    place = store.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    said = f"{size(free)} free for {store}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "problem", f"{place} can't be written; choose another --store, or --dir on a node")
    return Finding("disk", "note" if free < _ROOM else "fine", said)


def _port(port: int) -> Finding:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Finding("port", "fine", f"{port} is free")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Finding("port", "note", f"{port} can't be listened on ({reason}); `atoll serve --port` takes another")


def _plan(path: Path) -> tuple[Plan | None, Finding]:
    from atoll import algorithms, compression, learners, method

    plan = None
    try:
        plan = Plan.load(path)
        learner = learners.build(plan)
        algorithm = method.find(plan, learner)
        compression.find(plan, algorithm.updates(learner.layouts), sums=algorithms.adds(algorithm))
        compression.down(plan, learner.layouts)
    except AtollError as error:
        return plan, Finding("plan", "problem", str(error))
    return plan, Finding("plan", "fine", f"{plan.plan.name}, a {plan.model.kind} model, digest {plan.digest[:12]}")


def _broker(address: str, kafka_config: Path | None) -> Finding:
    from atoll.logs import access

    try:
        from atoll.logs.topics import brokers
    except ModuleNotFoundError:
        return Finding("broker", "problem", f"{address}: confluent-kafka is not installed; pip install '{_NAME}[kafka]'")
    try:
        return Finding("broker", "fine", f"{address} answers: {brokers(address, _PATIENCE, access.read(kafka_config))} in all")
    except AtollError as error:
        return Finding("broker", "problem", str(error))


def _server(url: str, trust: Trust) -> Iterator[Finding]:
    shown = re.sub(r"//[^/@]*@", "//", url)  # without a password in it
    try:
        with asked(shown, "/healthz", trust) as answer:
            run, date = json.loads(answer.read())["run"], answer.headers.get("Date")
    except (AtollError, OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        said = error if isinstance(error, AtollError) else f"{shown}: no Atoll server answers there ({error!r})"
        yield Finding("server", "problem", str(said))
        return
    yield Finding("server", "fine", f"{shown} serves run {run}")
    if date:
        apart = abs(time.time() - email.utils.parsedate_to_datetime(date).timestamp())
        said = f"{apart:.0f} s apart from the server's"
        yield Finding("clocks", "note" if apart > 30 else "fine", f"{said}; certificates may fail" if apart > 30 else said)
