"""The node's ledger: its own record of what left it, written before anything does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Column, Float, Index, Integer, MetaData, String, Table, func, insert, or_, select, update

from atoll.errors import PrivacyError
from atoll.privacy.dp.accountant import Release
from atoll.store.database import Database
from atoll.vector import Metrics
from atoll.wire import Envelope

_TABLES = MetaData()
_ENTRIES = Table(
    "ledger",
    _TABLES,
    Column("id", Integer, primary_key=True),
    *(Column(name, String) for name in ("run", "node", "digest", "plan", "guard", "verdict", "reason")),
    *(Column(name, Integer) for name in ("round", "attempt", "bytes", "steps")),
    *(Column(name, Float) for name in ("at", "judged_at", "epsilon", "delta", "multiplier", "rate")),
)
_FIGURES = Table(
    "figures",
    _TABLES,
    Column("id", Integer, primary_key=True),
    *(Column(name, String) for name in ("run", "plan", "figures")),
    Column("at", Float),
)
_AGREED = Table("agreed", _TABLES, Column("plan", String, primary_key=True), Column("name", String), Column("at", Float))
Index("ledger_by_plan", _ENTRIES.c.plan)
Index("ledger_by_digest", _ENTRIES.c.digest)
_GIVEN = Table(
    "given",
    _TABLES,
    Column("run", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer),
    *(Column(name, String) for name in ("plan", "model", "cohort", "numbers")),
    Column("at", Float),
)
_HEADS = Table(
    "heads",
    _TABLES,
    Column("id", Integer, primary_key=True),
    *(Column(name, String) for name in ("run", "plan", "head", "signature", "key")),
    Column("number", Integer),
    Column("at", Float),
)


class Spent(NamedTuple):
    """What a run's updates tell of a row or a node at most, so far: (ε, δ)-differential privacy."""

    epsilon: float
    delta: float


class Gift(NamedTuple):
    """A sum that a node helps to reveal: where it stands, the model that updates were made from, and what they are.

    `cohort` is a hash of whose they are, `numbers` of the node's own.
    """

    run: str
    round: int
    attempt: int
    plan: str
    model: str
    cohort: str
    numbers: str


def own_noise(guard: str) -> bool:
    """Say whether a guard, in the ledger's words, is noise of the node's own: each update costs, whatever run it is for."""
    return any(kind in guard for kind in ("local noise", "example noise", "distributed noise"))


def bounds(entries: Iterable[Mapping[str, Any]]) -> dict[str, Spent]:
    """Return what left with a bound, by what that covers: a plan, where updates carry noise of the node's own; else a run."""
    found: dict[str, Spent] = {}
    for row in entries:
        if row["epsilon"] is not None:
            key, spent = row["plan"] if own_noise(row["guard"]) else row["run"], Spent(row["epsilon"], row["delta"])
            found[key] = max(found.get(key, spent), spent)
    return found


@dataclass(frozen=True)
class Seen:
    """A head of a run's record that the server showed, signed by its key: see `chain`."""

    run: str
    plan: str
    number: int
    head: str
    signature: str
    key: str
    at: float


class Ledger:
    """What left a node: when, what, and what became of it; and the heads of the server's records that it was shown.

    Args:
        directory: the node's own directory.

    Raises:
        StoreError: it can't be read or written; nothing leaves then.
    """

    def __init__(self, directory: Path) -> None:
        self._base = Database(directory, "ledger.sqlite", _TABLES, cache=128)  # it is written, and hardly ever read
        self._waiting: list[Any] = []

    def leaving(
        self, envelope: Envelope, now: float, guard: str = "none", spent: Spent | None = None, release: Release | None = None
    ) -> None:
        """Write that an update is about to leave; one that leaves again as it was is written once.

        Args:
            envelope: the update's.
            now: seconds since 1970.
            guard: what protects it, in a few words.
            spent: what the run has cost with it; None where no noise bounds what it tells.
            release: what it tells by itself, under noise of the node's own: as it is now, whatever rows come later.
        """
        place = (_ENTRIES.c.digest == envelope.digest, _ENTRIES.c.run == envelope.address.run)
        with self._base.begin() as base:
            if base.scalar(select(func.count()).where(*place)):
                return
        facts = {**envelope.address._asdict(), "digest": envelope.digest, "bytes": envelope.size, "plan": envelope.plan}
        facts |= {**(spent._asdict() if spent else {}), **(release._asdict() if release else {})}
        self._write(insert(_ENTRIES).values(**facts, guard=guard, at=now))

    def telling(self, run: str, plan: str, figures: Metrics, now: float) -> None:
        """Write that the figures of a final model on this node's rows are about to leave."""
        self._write(insert(_FIGURES).values(run=run, plan=plan, figures=json.dumps(dict(figures)), at=now))

    def gives(self, gift: Gift, now: float) -> None:
        """Write that a sum is about to get what reveals it.

        Raises:
            PrivacyError: one of this round over other nodes, or of other numbers, got it; or one over other nodes of updates that
                were made from this very model, in whatever run: training is the same there, and the two would differ by
                single updates.
        """
        facts = gift._asdict()
        with self._base.begin() as base:  # written before it is looked at: whoever else has this file open waits
            base.execute(insert(_GIVEN).prefix_with("OR IGNORE").values(**facts, at=now))
            alike = ((_GIVEN.c.run == gift.run) & (_GIVEN.c.round == gift.round)) | (
                (_GIVEN.c.plan == gift.plan) & (_GIVEN.c.model == gift.model)
            )
            for row in base.execute(select(_GIVEN).where(alike)).mappings():
                here = (row["run"], row["round"]) == (gift.run, gift.round)
                if row["cohort"] == gift.cohort and (not here or row["numbers"] == gift.numbers):
                    continue  # of the same numbers it is the same sum, whatever it is asked for as
                if row["cohort"] == gift.cohort:
                    raise PrivacyError(
                        f"this node's update isn't the one of the sum of round {gift.round} that it helped to reveal: its rows, "
                        "or what it is to remember, changed; a second sum would tell how"
                    )
                if here:
                    raise PrivacyError(
                        f"a sum of round {gift.round} over other nodes was revealed; a second one would tell of single nodes"
                    )
                raise PrivacyError(
                    "a sum over other nodes of updates from this very model was revealed, and a second one would tell of "
                    "single nodes; a new run of the plan takes another plan.seed, or all the nodes of the last one"
                )

    def sent(self, run: str, round_: int, attempt: int) -> bool:
        """Say whether an update for a try of a round left already."""
        place = (_ENTRIES.c.run == run) & (_ENTRIES.c.round == round_) & (_ENTRIES.c.attempt == attempt)
        with self._base.begin() as base:
            return base.scalar(select(_ENTRIES.c.id).where(place).limit(1)) is not None

    def knows(self, digest: str) -> bool:
        """Say whether an update left by this ledger."""
        with self._base.begin() as base:
            return base.scalar(select(_ENTRIES.c.id).where(_ENTRIES.c.digest == digest).limit(1)) is not None

    def tries(self, run: str, round_: int, but: int) -> int:
        """Return for how many tries of a round an update left, but for one of them."""
        place = (_ENTRIES.c.run == run) & (_ENTRIES.c.round == round_) & (_ENTRIES.c.attempt != but)
        with self._base.begin() as base:
            return base.scalar(select(func.count(_ENTRIES.c.attempt.distinct())).where(place)) or 0

    def judged(self, digest: str, accepted: bool, reason: str, now: float) -> None:
        """Note what became of an update; it is written with the next entry, so that a round costs one sync and not two."""
        verdict = "accepted" if accepted else "refused"
        change = update(_ENTRIES).where(_ENTRIES.c.digest == digest)
        self._waiting.append(change.values(verdict=verdict, reason=reason, judged_at=now))

    def saw(self, head: Seen) -> None:
        """Note a head that the server showed; it is written with the next entry."""
        self._waiting.append(insert(_HEADS).values(asdict(head)))

    def heads(self) -> list[Seen]:
        """Return all heads that were shown, the oldest first."""
        self._write()
        query = select(*(column for column in _HEADS.c if column.name != "id")).order_by(_HEADS.c.id)
        with self._base.begin() as base:
            return [Seen(**row) for row in base.execute(query).mappings()]

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries, the oldest first."""
        self._write()
        with self._base.begin() as base:
            return [dict(row) for row in base.execute(select(_ENTRIES).order_by(_ENTRIES.c.id)).mappings()]

    def figures(self) -> list[dict[str, Any]]:
        """Return all figures of final models that left, the oldest first."""
        with self._base.begin() as base:
            found = base.execute(select(_FIGURES).order_by(_FIGURES.c.id)).mappings()
            return [{**row, "figures": json.loads(row["figures"])} for row in found]

    def left(self, plan: str | None, but: tuple[str, int, int] = ("", 0, 0)) -> int:
        """Return how many updates of a plan, or of all, left in whatever run, but for the one of a run, round and attempt.

        One that was resent as it was counts once.
        """
        place = _ENTRIES.c.run, _ENTRIES.c.round, _ENTRIES.c.attempt
        other = or_(*(column != value for column, value in zip(place, but, strict=True)))
        with self._base.begin() as base:
            query = select(func.count(_ENTRIES.c.digest.distinct())).where(other)
            query = query if plan is None else query.where(_ENTRIES.c.plan == plan)
            return base.scalar(query) or 0

    def releases(self, plan: str, but: tuple[str, int, int]) -> list[Release | None]:
        """Return what each update of a plan that left told by itself, but for one as in `left`; None where it wasn't noted."""
        columns = [_ENTRIES.c[name] for name in ("digest", *Release._fields)]
        place = _ENTRIES.c.run, _ENTRIES.c.round, _ENTRIES.c.attempt
        other = or_(*(column != value for column, value in zip(place, but, strict=True)))
        with self._base.begin() as base:
            found = base.execute(select(*columns).where((_ENTRIES.c.plan == plan) & other).distinct())
            return [None if row.multiplier is None else Release(*row[1:]) for row in found]

    def agree(self, plan: str, name: str, now: float) -> None:
        """Write that the owner read a plan and agreed to it."""
        if not self.agreed(plan):
            self._write(insert(_AGREED).values(plan=plan, name=name, at=now))

    def agreed(self, plan: str) -> bool:
        """Say whether the owner agreed to a plan."""
        with self._base.begin() as base:
            return base.scalar(select(_AGREED.c.at).where(_AGREED.c.plan == plan)) is not None

    def close(self) -> None:
        """Write what is left to write, and let go of the file."""
        try:
            self._write()
        finally:
            self._base.close()

    def _write(self, *changes: Any) -> None:
        with self._base.begin() as base:
            for change in (*self._waiting, *changes):
                base.execute(change)
        self._waiting = []
