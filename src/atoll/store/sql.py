"""The history of runs in a database, by SQLAlchemy Core: SQLite in a directory, in memory, or any URL."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from atoll.chain import Noted
from atoll.errors import StoreError
from atoll.learner import summary
from atoll.metrics import reliability
from atoll.stopping import gain
from atoll.store import SPREAD, EvaluationRow, NodeRow, RoundRow, RunRow, Tally, UpdateRow
from atoll.store.database import MEMORY, Database

R = TypeVar("R", UpdateRow, EvaluationRow)
_TABLES = MetaData()


def _table(name: str, *columns: Column[Any]) -> Table:
    return Table(name, _TABLES, *columns)


def _key(name: str, kind: Any = String) -> Column[Any]:
    return Column(name, kind, primary_key=True, autoincrement=False)


def _fact(name: str, kind: Any = String) -> Column[Any]:
    return Column(name, kind, nullable=True)


_RUNS = _table(
    "runs", _key("run"), _fact("name"), _fact("plan_digest"), _fact("plan", Text), _fact("started", Float),
    _fact("initial"), _fact("ended", Float), _fact("outcome"), _fact("reason", Text),
    _fact("log_start"), _fact("opened", JSON), _fact("pruned", Float),
)  # fmt: skip
_NODES = _table(
    "nodes", _key("run"), _key("node"), _fact("name"), _fact("key"), _fact("first_seen", Float), _fact("last_seen", Float)
)  # fmt: skip
_ROUNDS = _table(
    "rounds", _key("run"), _key("round", Integer), _fact("attempt", Integer), _fact("started", Float), _fact("seconds", Float),
    _fact("model"), _fact("state"), _fact("cohort", Integer), _fact("accepted", Integer), _fact("bytes", Integer),
    _fact("registered", Integer), _fact("reference"), _fact("noise", JSON(none_as_null=True)), _fact("epsilon", Float),
    _fact("dissimilarity", Float), _fact("fetched", Integer),
)  # fmt: skip
_UPDATES = _table(
    "updates", Column("id", Integer, primary_key=True), _fact("run"), _fact("round", Integer), _fact("attempt", Integer),
    _fact("node"), _fact("status"), _fact("digest"), _fact("bytes", Integer), _fact("seconds", Float), _fact("weight", Float),
    _fact("reason", Text), _fact("position"), _fact("place", Integer), _fact("metrics", JSON), _fact("norm", Float),
    _fact("offence", Boolean), _fact("folded", Integer), _fact("cosine", Float),
)  # fmt: skip
Index("updates_by_round", _UPDATES.c.run, _UPDATES.c.round)
Index("updates_by_fold", _UPDATES.c.run, _UPDATES.c.folded)
_EVALUATIONS = _table("evaluations", _key("run"), _key("round", Integer), _key("place"), _fact("metrics", JSON))
_RECORD = _table(
    "record", _key("run"), _key("number", Integer), _fact("entry", Text), _fact("head", String), _fact("signature", String)
)  # fmt: skip


class SqlStore:
    """The history of runs. What takes a `link` stores that entry of the run's record in the same transaction.

    Args:
        place: a directory (SQLite, `atoll.sqlite` in it), or a database URL; without one it lives in memory.

    Raises:
        StoreError: see `Database`; every method raises it too where the database fails.
    """

    def __init__(self, place: str | Path = MEMORY) -> None:
        self._base = Database(place, "atoll.sqlite", _TABLES)
        self.together = self._base.together

    def close(self) -> None:
        """Let go of the database."""
        self._base.close()

    def begin_run(self, row: RunRow, link: Noted | None = None) -> None:
        """Store that a run has begun."""
        with self._base.begin() as base:
            base.execute(insert(_RUNS).values(asdict(row)))
            _chain(base, link)

    def record(self, link: Noted) -> None:
        """Store an entry of a run's record by itself."""
        with self._base.begin() as base:
            _chain(base, link)

    def links(self, run: str) -> list[Noted]:
        """Return the record of a run."""
        return [Noted(**row) for row in self._read(select(_RECORD).where(_RECORD.c.run == run).order_by(_RECORD.c.number))]

    def open_round(self, run: str, opened: Mapping[str, Any], link: Noted | None = None) -> None:
        """Store that a round has begun, see `RunRow.opened`, and that the run goes on."""
        with self._base.begin() as base:
            going = {"opened": opened, "outcome": "running", "ended": None, "reason": ""}
            base.execute(update(_RUNS).where(_RUNS.c.run == run).values(**going))
            _chain(base, link)

    def end_run(self, run: str, outcome: str, reason: str, now: float, link: Noted | None = None) -> None:
        """Store how a run ended."""
        with self._base.begin() as base:
            base.execute(update(_RUNS).where(_RUNS.c.run == run).values(outcome=outcome, reason=reason, ended=now))
            _chain(base, link)

    def saw_node(self, row: NodeRow, link: Noted | None = None) -> None:
        """Store that a node joined, or that it is back."""
        mine = (_NODES.c.run == row.run) & (_NODES.c.node == row.node)
        with self._base.begin() as base:
            if not base.execute(update(_NODES).where(mine).values(name=row.name, last_seen=row.last_seen)).rowcount:
                base.execute(insert(_NODES).values(asdict(row)))
            _chain(base, link)

    def record_update(self, row: UpdateRow, link: Noted | None = None) -> None:
        """Store an update that doesn't count, and why."""
        with self._base.begin() as base:
            base.execute(insert(_UPDATES).values(asdict(row)))
            _chain(base, link)

    def close_round(
        self, row: RoundRow, updates: Sequence[UpdateRow], evaluations: Sequence[EvaluationRow], link: Noted | None = None
    ) -> None:
        """Store a closed round whole, in one transaction: its model, its accepted updates, how models did."""
        with self._base.begin() as base:
            base.execute(insert(_ROUNDS).values(asdict(row)))
            if updates:  # drawn in secret, it may be nobody
                base.execute(insert(_UPDATES), [asdict(one) for one in updates])
            for one in evaluations:
                _evaluate(base, one)
            _chain(base, link)

    def record_evaluation(self, row: EvaluationRow) -> None:
        """Store how a model does in one place; a later word on the same replaces it."""
        with self._base.begin() as base:
            _evaluate(base, row)

    def runs(self, skip: int = 0, count: int | None = None) -> list[RunRow]:
        """Return all runs, the newest first; or only `count` of them after the first `skip`."""
        query = select(_RUNS).order_by(_RUNS.c.started.desc()).limit(count).offset(skip)
        return [RunRow(**row) for row in self._read(query)]

    def get(self, run: str) -> RunRow | None:
        """Return the run with exactly this id, or None."""
        return next((RunRow(**row) for row in self._read(select(_RUNS).where(_RUNS.c.run == run))), None)

    def find(self, run: str | None = None) -> RunRow:
        """Return a run by its id or the start of it; without one the newest.

        Raises:
            StoreError: no run, or several, go by that.
        """
        runs = self.runs()
        if not runs:
            raise StoreError(f"{self._base.place}: no run is stored here; name another --store")
        found = [row for row in runs if run is None or row.run.startswith(run)]
        if run is not None and len(found) != 1:
            many = "several runs start" if found else "no run starts"
            raise StoreError(f"{self._base.place}: {many} with '{run}'; there are: {', '.join(row.run for row in runs[:10])}")
        return found[0]

    def nodes(self, run: str) -> list[NodeRow]:
        """Return the nodes that joined a run, by name."""
        rows = self._read(select(_NODES).where(_NODES.c.run == run).order_by(_NODES.c.name))
        return [NodeRow(**row) for row in rows]

    def rounds(self, run: str, first: int = 1, last: int | None = None) -> list[RoundRow]:
        """Return the closed rounds of a run, or some of them."""
        c = _ROUNDS.c
        wanted = (c.run == run) & (c.round >= first)
        if last is not None:
            wanted &= c.round <= last
        return [RoundRow(**row) for row in self._read(select(_ROUNDS).where(wanted).order_by(c.round))]

    def updates(self, run: str, round_: int | None = None, nodes: Collection[str] = ()) -> list[UpdateRow]:
        """Return all that came from nodes: by the round it counts in, accepted ones in the order of their fold; or some of it."""
        c = _UPDATES.c
        wanted = c.run == run
        if round_ is not None:
            wanted &= ((c.round == round_) & c.folded.is_(None)) | (c.folded == round_)
        if nodes:
            wanted &= c.node.in_(nodes)
        columns = [column for column in c if column.name != "id"]
        rows = self._read(select(*columns).where(wanted).order_by(func.coalesce(c.folded, c.round), c.place, c.attempt, c.id))
        return [UpdateRow(**row) for row in rows]

    def refused(self, run: str, first: int, last: int, most: int) -> list[UpdateRow]:
        """Return the newest of what came in some rounds and doesn't count, the newest first."""
        c = _UPDATES.c
        wanted = (c.run == run) & c.round.between(first, last) & (c.status != "accepted")
        columns = [column for column in c if column.name != "id"]
        return [UpdateRow(**row) for row in self._read(select(*columns).where(wanted).order_by(c.id.desc()).limit(most))]

    def late(self, run: str, first: int, last: int) -> dict[int, int]:
        """Return how many updates for earlier rounds count in each of some rounds; a round without any isn't there."""
        c = _UPDATES.c
        wanted = (c.run == run) & c.folded.between(first, last)
        with self._base.begin() as base:
            found = base.execute(select(c.folded, func.count()).where(wanted).group_by(c.folded))
            return {row[0]: row[1] for row in found}

    def evaluations(self, run: str, first: int = 0, places: Collection[str] = (), last: int | None = None) -> list[EvaluationRow]:
        """Return how the models of a run did, by round; or only in some rounds, or in some places.

        What lies at `SPREAD` is no place's sums, and comes only where it is named.
        """
        c = _EVALUATIONS.c
        wanted = (c.run == run) & (c.round >= first)
        wanted &= c.place.in_(places) if places else c.place != SPREAD
        if last is not None:
            wanted &= c.round <= last
        query = select(c.run, c.round, c.place, c.metrics).where(wanted).order_by(c.round, c.place)
        with self._base.begin() as base:  # there may be tens of thousands: by position, which is quicker than by name
            return [EvaluationRow(*row) for row in base.execute(query)]

    def tally(self, run: str, since: Tally = Tally()) -> Tally:  # noqa: B008  a frozen value
        """Count what has come of a run, going on from an earlier count."""
        r, u = _ROUNDS.c, _UPDATES.c
        sums = select(func.count(), func.sum(r.seconds), func.sum(r.bytes), func.max(r.round))
        kinds = select(u.status, func.count(), func.max(u.id)).group_by(u.status)
        with self._base.begin() as base:
            count, seconds, size, last = base.execute(sums.where((r.run == run) & (r.round > since.last_round))).one()
            # Newer ids are few, and a run's updates may be many: the index by run must not be what is gone through.
            mine = u.run.concat("") == run if since.last_update else u.run == run
            found = base.execute(kinds.where(mine & (u.id > since.last_update))).all()
        return Tally(
            since.rounds + count,
            since.seconds + (seconds or 0.0),
            since.bytes + (size or 0),
            {**since.updates, **{status: since.updates.get(status, 0) + number for status, number, _ in found}},
            max(since.last_round, last or 0),
            max([since.last_update, *(newest for _, _, newest in found)]),
        )

    @contextlib.contextmanager
    def pruning(self, runs: Collection[str], now: float) -> Iterator[None]:
        """Note that the files of runs go; until the block ends nobody else writes, so that no run comes to need them."""
        with self._base.begin() as base:
            base.execute(update(_RUNS).where(_RUNS.c.run.in_(runs)).values(pruned=now))
            noisy = select(_ROUNDS.c.run, _ROUNDS.c.round, _ROUNDS.c.noise).where(_ROUNDS.c.run.in_(runs))
            for run, round_, noise in base.execute(noisy.where(_ROUNDS.c.noise.is_not(None))).all():
                mine = (_ROUNDS.c.run == run) & (_ROUNDS.c.round == round_)
                base.execute(update(_ROUNDS).where(mine).values(noise={**noise, "key": None}))
            yield

    def history(self, run: str | None = None) -> dict[str, Any]:
        """Return a run as plain values: its facts, its nodes, and each round with who answered and how its model does.

        Raises:
            StoreError: as `find`.
        """
        found = self.find(run)
        names = {row.node: row.name for row in self.nodes(found.run)}
        evaluations = self.evaluations(found.run)
        came, judged = _by(self.updates(found.run), "counted"), _by(evaluations, "round")
        apart = {row.round: row.metrics for row in self.evaluations(found.run, places=(SPREAD,))}
        rounds = [
            _told(row, names, came[row.round], judged[row.round], apart.get(row.round, {})) for row in self.rounds(found.run)
        ]
        facts = {key: value for key, value in asdict(found).items() if key != "plan"}
        start = {row.place: summary(row.metrics) for row in evaluations if row.round == 0}
        plan = json.loads(found.plan)  # as it was agreed to, maybe under an older version: so not checked again
        return {
            **facts,
            "planned": plan.get("plan", {}).get("rounds"),
            "metrics": plan.get("model", {}).get("metrics", []),
            "nodes": [{"node": node, "name": name} for node, name in names.items()],
            "initial_evaluation": start,
            "rounds": rounds,
            "reliability": _reliability(evaluations),
            "best": _best(rounds, plan.get("stopping", {})),
            "last": rounds[-1]["model"] if rounds else found.initial,
        }

    def _read(self, query: Any) -> list[dict[str, Any]]:
        with self._base.begin() as base:
            return [dict(row) for row in base.execute(query).mappings()]


def _reliability(evaluations: Sequence[EvaluationRow]) -> list[dict[str, float]]:
    """The reliability curve of the newest judged model, on the holdout where there is one; empty where the plan asks for none."""
    whole = [row for row in evaluations if row.place in ("holdout", "nodes")]
    curves = {row.place: curve for row in whole if (curve := reliability(row.metrics))}
    return curves.get("holdout") or curves.get("nodes") or []


def _chain(base: Any, link: Noted | None) -> None:
    if link is not None:
        base.execute(insert(_RECORD), vars(link))


def _evaluate(base: Any, row: EvaluationRow) -> None:
    c = _EVALUATIONS.c
    base.execute(delete(_EVALUATIONS).where((c.run == row.run) & (c.round == row.round) & (c.place == row.place)))
    base.execute(insert(_EVALUATIONS).values(asdict(row)))


def _by(rows: Iterable[R], number: str) -> defaultdict[int, list[R]]:
    found: defaultdict[int, list[R]] = defaultdict(list)
    for row in rows:
        found[getattr(row, number)].append(row)
    return found


def _told(
    row: RoundRow,
    names: dict[str, str],
    mine: Sequence[UpdateRow],
    evaluations: Sequence[EvaluationRow],
    apart: Mapping[str, Any],
) -> dict[str, Any]:
    """A round in plain values, from what came in it and how its model does."""
    judged = {one.place: one.metrics for one in evaluations}
    return {
        **{key: value for key, value in asdict(row).items() if key not in ("run", "noise")},
        "answered": [names.get(one.node, one.node) for one in mine if one.status == "accepted"],
        "late": {names.get(one.node, one.node): one.counted - one.round for one in mine if one.folded},
        "refused": [
            {"name": names.get(one.node, one.node), "status": one.status, "reason": one.reason}
            for one in mine
            if one.status != "accepted"
        ],
        "holdout": summary(judged.get("holdout", {})),
        "nodes": summary(judged.get("nodes", {})),
        "spread": {name: {**one, "node": names.get(one["node"], one["node"])} for name, one in apart.items()},
        "drift": {
            names.get(one.node, one.node): {"norm": one.norm, "cosine": one.cosine} for one in mine if one.cosine is not None
        },
        "by_node": {names[place]: summary(sums) for place, sums in judged.items() if place in names},
    }


def _best(rounds: Sequence[dict[str, Any]], stopping: Mapping[str, Any]) -> str | None:
    """The model with the best figure, on the holdout where there is one, else on the nodes' own rows; of equals the first."""
    metric, better = stopping.get("metric", "loss"), stopping.get("better")
    judged = [(gain(metric, row["holdout"] or row["nodes"], better), -row["round"], row["model"]) for row in rounds]
    most, _, model = max(judged, default=(-math.inf, 0, None))
    return None if math.isinf(most) else model
