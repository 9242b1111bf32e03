"""Replaying a run: every global model once more, from the updates in the log."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from atoll import algorithms, compression, learners, method
from atoll.algorithms import Algorithm, State
from atoll.compression import Down
from atoll.errors import LogError, StoreError
from atoll.learner import Learner
from atoll.logs import Reader, Record
from atoll.logs.access import PLAIN, Access
from atoll.logs.embedded import Stored
from atoll.plan import Plan
from atoll.privacy import choose as privacy
from atoll.server import transcript
from atoll.server.close import Accepted, Undo, close
from atoll.server.resume import address_of
from atoll.store import RoundRow, RunRow
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.vector import Groups, Layouts, layouts_of
from atoll.wire import Address, digest_of, pack

_COPIES = ".replay"
_PATIENCE = 30.0
"""Seconds in which a log that never ends brings nothing until an update counts as gone."""


class Replayed(NamedTuple):
    """A round, done again: how many updates it took, the digest of the stored model, and of the one that came out."""

    round: int
    updates: int
    stored: str
    found: str


async def replay(
    directory: Path,
    store: SqlStore,
    run: RunRow,
    learner: Learner | None = None,
    allow: Collection[str] = (),
    access: Access = PLAIN,
) -> AsyncIterator[Replayed]:
    """Recompute the global model of every closed round from the run's initial model and its logged updates.

    Ends with the first round that comes out otherwise than it was stored.

    Args:
        directory: of the store.
        store: its history.
        run: which run.
        learner: the run's, where the plan names none.
        allow: functions ("package.module:function") that the plan may name here, beside those of installed packages.
        access: by what Kafka knows this machine.

    Raises:
        StoreError: the run's files were let go, or its initial model, or what its server trained, isn't what it was.
        LogError: an update that counted is missing from the log, or isn't what it was.
    """
    if run.pruned is not None:
        raise StoreError(f"run {run.run}: its updates were pruned; only its history is left")
    plan = Plan.from_json(run.plan)
    learner = learner or learners.build(plan, allow)
    algorithm = method.find(plan, learner)
    whole = algorithm.updates(learner.layouts)
    press, down = compression.find(plan, whole, sums=algorithms.adds(algorithm)), compression.down(plan, learner.layouts)
    state = _initial(algorithm, learner, down, Models(directory / "models"), run, plan.plan.seed)
    link, protected = privacy.protected(plan, whole, press.layouts(whole), algorithm.least)
    log = _open(directory / "log", run, plan, sum(one.nbytes for one in protected.values()), access)
    for one in store.nodes(run.run):
        await asyncio.to_thread(log.follow, one.node)
    updates = [one for one in store.updates(run.run) if one.status == "accepted"]
    late = [one for one in updates if one.folded]
    model, given, seen, records = run.initial, algorithm.brief(state), dict[tuple[Address, str], Record](), log.records()
    models = {1: model}  # round → the model that nodes were asked with
    try:
        for row in store.rounds(run.run):
            mine = [one for one in updates if one.counted == row.round]
            wanted = [(address_of(one), one.digest) for one in mine]
            while missing := [key for key in wanted if key not in seen]:
                if (record := await _next(records)) is None:
                    raise LogError(f"run {run.run}: the log lacks update {missing[0][1][:12]} of round {row.round}")
                seen[record.envelope.address, record.envelope.digest] = record
            accepted = [
                Accepted(one.node, partial(_body, log, seen.pop(key)), row.round - one.round, models[one.round], one.round)
                for one, key in zip(mine, wanted, strict=True)
            ]
            own = _trained(directory, row, algorithm.updates(learner.layouts))
            place = transcript.path_of(directory, run.run, row.round)
            guard = transcript.replayed(link, plan, protected, place, run.run, row.round) if link else None
            undo = _noised(plan, algorithm.updates(learner.layouts), row)
            about = algorithm, state, learner.layouts, model, accepted, row.registered, own
            state = await asyncio.to_thread(partial(close, guard=guard, undo=undo, press=press), *about)
            given = down.next(algorithm.brief(state), given, row.round)[0]
            model = models[row.round + 1] = digest_of(pack(*down.file(given)))
            later = {address_of(one) for one in late if one.round <= row.round < one.counted}
            await asyncio.to_thread(log.forget, row.round, later)
            yield Replayed(row.round, len(accepted), row.model, model)
            if model != row.model:
                return
    finally:
        await log.close()
        shutil.rmtree(directory / "log" / _COPIES, ignore_errors=True)


def _initial(algorithm: Algorithm, learner: Learner, down: Down, models: Models, run: RunRow, seed: int) -> State:
    layouts = layouts_of(algorithm.brief(algorithm.init(learner.initial(seed))))
    found = down.received(models.get(run.initial, down.layouts(layouts)), layouts)
    state = algorithm.init({name: found[name] for name in learner.layouts})
    if digest_of([models.path(run.initial).read_bytes()]) != run.initial:
        raise StoreError(f"{models.path(run.initial)}: the initial model isn't what it was: the file is damaged")
    return state


def _trained(directory: Path, row: RoundRow, layouts: Layouts) -> Groups | None:
    """What the server itself trained in a round: as it was stored, since its rows, and the machine it trained on, may be gone."""
    if not row.reference:
        return None
    models = Models(directory / "models")
    found = models.get(row.reference, layouts)
    if digest_of(pack(found)) != row.reference:
        raise StoreError(f"{models.path(row.reference)}: the server's own update of round {row.round} isn't what it was")
    return found


def _noised(plan: Plan, layouts: Layouts, row: RoundRow) -> Undo | None:
    """What added the round's noise: the very same, from the key that was kept."""
    if not (plan.privacy.central_noise or plan.privacy.tree_noise):
        return None
    if not row.noise or not row.noise["key"]:
        raise StoreError(f"run {row.run}: what the noise of round {row.round} was made of is gone; it can't be done again")
    return method.noised(plan, layouts, row.noise)


def _open(directory: Path, run: RunRow, plan: Plan, size: int, access: Access) -> Reader:
    if plan.log.kafka is None:
        return Stored(directory, run.run)
    from atoll.logs.kafka import KafkaReader  # an optional part

    topic, start, limit = plan.log.topic, run.log_start or "", 2 * size + (1 << 20)
    copies, apart = directory / _COPIES, plan.log.apart
    return KafkaReader(plan.log.kafka, topic, run.run, copies, limit, start, access=access, apart=apart)


async def _next(records: AsyncIterator[Record]) -> Record | None:
    try:
        return await asyncio.wait_for(anext(records, None), _PATIENCE)
    except TimeoutError:
        return None


def _body(log: Reader, record: Record) -> memoryview:
    body = log.body(record.envelope)
    if hashlib.sha256(body).hexdigest() != record.envelope.digest:
        raise LogError(f"update {record.envelope.digest[:12]} of round {record.envelope.address.round}: the disk altered it")
    return body
