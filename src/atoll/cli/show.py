"""How runs look to a person: tables, lines, and a sign that something is going on."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from atoll.errors import AtollError
from atoll.metrics import ASIDE


def size(count: float) -> str:
    """Say a number of bytes in the unit that fits.

    >>> size(900), size(4_000_000)
    ('900 B', '4.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def size_of(text: str) -> int:
    """Read a number of bytes with its unit.

    Raises:
        AtollError: it is none.

    >>> size_of("50GB"), size_of("1.5 MB")
    (50000000000, 1500000)
    """
    for power, unit in enumerate(("B", "KB", "MB", "GB", "TB")):
        with contextlib.suppress(ValueError):
            if (number := float(text.upper().removesuffix(unit))) > 0 and text.upper().endswith(unit):
                return int(number * 1000**power)
    raise AtollError(f"'{text}' is no size; it looks like 50GB or 800MB")


def clock(seconds: float) -> str:
    """Say a time since the beginning.

    >>> clock(7.26), clock(754), clock(200_000)
    ('7.3 s', '12 min 34 s', '2 d 7 h 33 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h {minutes} min" if hours >= 24 else f"{hours} h {minutes} min"


_HUGE = 1e6
"""Beyond it a figure, as of a model that diverges, isn't written out."""


def figure(figures: Mapping[str, float], name: str, digits: int = 4) -> str:
    """Return a figure as text, or a dash where it is missing.

    >>> figure({"loss": 0.5}, "loss"), figure({"loss": 1.5e300}, "loss"), figure({}, "loss")
    ('0.5000', '1.5e+300', '–')
    """
    if name not in figures:
        return "–"
    return f"{figures[name]:.{digits}f}" if abs(figures[name]) < _HUGE else f"{figures[name]:.4g}"


def plainly(judged: Mapping[str, float]) -> str:
    """Return all figures in one line, without how far off those are that are counted in bins: `--json` has that.

    >>> plainly({"loss": 0.5, "auc": 0.75, "auc_within": 0.001})
    'loss 0.5000, auc 0.7500'
    """
    return ", ".join(f"{name} {figure(judged, name)}" for name in judged if not name.endswith("_within"))


def told(judged: Mapping[str, float], asked: Collection[str] = ()) -> list[str]:
    """Return the names of the figures that have room in one line: loss, accuracy, and the metrics that the plan asked for."""
    return [name for name in judged if name in asked or name not in ASIDE]


def rounds_table(rounds: Sequence[Mapping[str, Any]], total: int, title: str, asked: Collection[str] = ()) -> Table:
    """Return the table of a run's rounds so far; each has `answered`, `cohort`, `judged`, `bytes`, `seconds`.

    The plan's metrics, those it `asked` for by name and its own, have columns beside loss and accuracy.
    """
    figures = list(dict.fromkeys(["loss", "accuracy", *(name for row in rounds for name in told(row["judged"], asked))]))
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("round", "who answered"):
        table.add_column(name, overflow="fold")
    private = ["ε"] if any(row.get("epsilon") is not None for row in rounds) else []
    for name in (*figures, *private, "bytes", "seconds"):
        table.add_column(name, justify="right")
    for row in rounds:
        judged = row["judged"]
        table.add_row(
            f"{row['round']}/{total}", f"{answered(row)}: {', '.join(row['answered'][:6])}",
            *(figure(judged, name) for name in figures), *(figure(row, "epsilon", 3) for _ in private),
            size(row["bytes"]), f"{row['seconds']:.2f}",
        )  # fmt: skip
    return table


def answered(row: Mapping[str, Any]) -> str:
    """Say how many of a round's nodes answered, and how many of their updates were for an earlier round.

    >>> answered({"answered": ["a", "b"], "cohort": 3, "late": {"b": 1}})
    '2 of 3, 1 late'
    """
    late = len(row.get("late", ()))
    return f"{len(row['answered'])} of {row['cohort']}{f', {late} late' if late else ''}"


def round_line(row: Mapping[str, Any], total: int, asked: Collection[str] = ()) -> str:
    """Return a round as one line, for where no table can grow."""
    figures = ", ".join(f"{name} {figure(row['judged'], name)}" for name in told(row["judged"], asked))
    seen = f"{answered(row)} answered; {figures or 'not judged'}"
    spent = "" if row.get("epsilon") is None else f", ε {row['epsilon']:.3g}"
    return f"round {row['round']}/{total}: {seen}{spent}; {size(row['bytes'])}, {row['seconds']:.2f} s"


_UNREAD = 10_000
"""So many events wait for a reader of the pipe; newer ones are left out."""


@contextlib.contextmanager
def printed() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give what prints events, one JSON object a line, in a thread: a pipe that nobody reads holds up the end, never the work."""
    lines: queue.Queue[str | None] = queue.Queue(_UNREAD)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever read it is gone
            for line in iter(lines.get, None):
                print(line, flush=True)

    def tell(event: Mapping[str, Any]) -> None:
        with contextlib.suppress(queue.Full):
            lines.put_nowait(json.dumps(event))

    writer = threading.Thread(target=write, name="events", daemon=True)
    writer.start()
    try:
        yield tell
    finally:
        while writer.is_alive():
            with contextlib.suppress(queue.Full):
                lines.put(None, timeout=0.1)
                break
        writer.join()


@contextlib.contextmanager
def working(said: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr for as long as the block takes, where a person watches; nothing for programs.

    Yields what says something else beside it.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status(f"{said} …") as status:
        yield lambda other: status.update(f"{other} …")
