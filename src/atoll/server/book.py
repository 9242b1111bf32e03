"""What the server remembers of the open round, and how it becomes history when the round is closed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from atoll.algorithms.drift import Drift
from atoll.chain import Chain
from atoll.errors import StoreError
from atoll.learner import named, pooled, summary
from atoll.logs import Record
from atoll.messages import Head, Verdict
from atoll.metrics import spread
from atoll.server import entries
from atoll.server.close import Accepted
from atoll.server.events import Close, Judge, Task
from atoll.server.patience import Patience
from atoll.server.resume import Unfinished, address_of
from atoll.store import SPREAD, EvaluationRow, NodeRow, RoundRow, RunRow, Status, UpdateRow
from atoll.store.sql import SqlStore
from atoll.vector import Metrics
from atoll.wire import Address, Buffer, Envelope

NOISE = 20
"""So many refusals of a node are stored in a try of a round, beside its offence: it can't fill the store with them."""


class Made(NamedTuple):
    """What a round gave.

    Digests of the model, the state, and the server's own update, where there is one; its noise and ε; how updates differed.
    """

    model: str
    state: str
    reference: str
    noise: Mapping[str, Any] | None = None
    epsilon: float | None = None
    drift: Drift | None = None


@dataclass(frozen=True)
class _Arrival:
    """A verified update of the open round."""

    envelope: Envelope
    row: UpdateRow


@dataclass(frozen=True)
class _Write:
    """Rows for the store, and the record's entry that tells of them; whoever waits for it."""

    act: Callable[..., None]
    rows: Sequence[Any]
    entry: Mapping[str, Any] | None
    done: asyncio.Future[None]


_TOGETHER = 500
"""So many writes at most are one transaction: whoever waits for the first of them waits for the last."""


class Book:
    """Keeps a run's history and its record; every write to the store goes through one worker, in order.

    Writes that wait while another is on its way are stored together, with one sync: thousands of nodes may come at once.

    Args:
        store: where history goes.
        chain: the record so far.
        run: its id.
        patience: how a store that fails is waited for.
        left: what another server left of the run, if that is so.

    Attributes:
        names: node → name.
        spoils: the updates of the open round of which the log refused a body.
        lost: node → since when, in seconds since the epoch, of those that were there and are away.
        counted: node → the digest of its last update that became part of a model.
    """

    def __init__(self, store: SqlStore, chain: Chain, run: str, patience: Patience, left: Unfinished | None = None) -> None:
        self.names: dict[str, str] = dict(left.past.names) if left else {}
        self.lost: dict[str, float] = {}
        self.spoils: set[Address] = set()
        self.counted: dict[str, str] = dict(left.counted) if left else {}
        self._holders = {name: node for node, name in self.names.items()}
        self._store, self._chain, self._run = store, chain, run
        self._durable, self._patience = chain.last, patience
        self._waiting: deque[_Write] = deque()
        self._admitted = dict(self.names)
        self._ended = False
        self._arrivals: dict[Address, _Arrival] = {}
        self._verdicts: dict[tuple[Address, str], tuple[int, Verdict]] = {}
        self._farewells: dict[str, Metrics] = {}
        self._summed, self._summing = set[str](), asyncio.Lock()
        self._closed, self._round = 0, left.past.closed if left else 0
        self._opened = 0.0
        self._fetched = 0
        self._asked: dict[tuple[int, int], float] = {}
        self._worker = ThreadPoolExecutor(1, "store")
        for one in left.accepted if left else ():  # who was not told any more will ask
            self.judged(address_of(one), one.digest, accepted=True, reason="")
        self._refused = set(left.refused) if left else set[tuple[Address, str]]()
        self._noise = Counter[str]()

    async def _write(self, act: Callable[..., None], *rows: Any, tell: Mapping[str, Any] | None = None) -> None:
        """Store something; for as long as the store fails, try again."""
        await self._patience.until_stored(lambda: self._try_to_write(act, *rows, tell=tell))

    async def _try_to_write(self, act: Callable[..., None], *rows: Any, tell: Mapping[str, Any] | None = None) -> None:
        loop = asyncio.get_running_loop()
        write = _Write(act, rows, tell, loop.create_future())
        self._waiting.append(write)
        self._worker.submit(self._store_waiting, loop)
        await write.done

    def _store_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Store what waits by now: all of it in one transaction, or, where that fails, each for itself."""
        batch = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
        faults: list[Exception | None] = [None] * len(batch)
        if len(batch) < 2 or self._fault(batch):
            faults = [self._fault([one]) for one in batch]
        for one, fault in zip(batch, faults, strict=True):
            loop.call_soon_threadsafe(_settle, one.done, fault)

    def _fault(self, batch: Sequence[_Write]) -> Exception | None:
        try:
            with self._store.together():
                for one in batch:
                    self._told(one.act, one.rows, one.entry)
        except Exception as error:  # noqa: BLE001  whoever waits for it gets it
            self._chain.last = self._durable
            return error
        self._durable = self._chain.last
        return None

    def _told(self, act: Callable[..., None], rows: Sequence[Any], entry: Mapping[str, Any] | None) -> None:
        """Store rows, and the record's entry that tells of them, together or not at all."""
        if entry is None:
            act(*rows)
            return
        link = self._chain.next({**entry, "at": time.time()})
        act(*rows, link)
        self._chain.last = link

    @property
    def head(self) -> Head | None:
        """The head of the record, as far as it is durable: a node that was told of it may hold the server to it."""
        last = self._durable
        return Head(number=last.number, digest=last.head, signature=last.signature) if last else None

    def begins(self, row: RunRow) -> None:
        """Store that a run begins."""
        self._told(self._store.begin_run, [row], entries.begun(row, self._chain.key))
        self._durable = self._chain.last

    def goes_on(self, left: Unfinished) -> None:
        """Begin the record of a run that went without one so far."""
        if self._chain.last is None:
            self._told(self._store.record, [], entries.begun(left.row, self._chain.key, left.past.closed))
            for one in self._store.nodes(self._run):
                self._told(self._store.record, [], entries.admitted(one.node, one.name, one.key))
            self._durable = self._chain.last

    def taken(self, node: str, name: str) -> bool:
        """Say whether another node of this run goes by a name: names order the fold, so each stands for one node."""
        return self._holders.get(name, node) != node

    async def saw(self, node: str, name: str, key: str) -> None:
        """A node joined, or is back."""
        self._holders.pop(self.names.get(node, name), None)
        self.names[node], self._holders[name] = name, node
        self.lost.pop(node, None)
        now = time.time()
        new = self._admitted.get(node) != name
        entry = entries.admitted(node, name, key) if new else None
        # It isn't waited for here where the store fails: the node knocks again.
        await self._try_to_write(self._store.saw_node, NodeRow(self._run, node, name, key, now, now), tell=entry)
        self._admitted[node] = name

    async def revoked(self, node: str) -> None:
        """Tell the record that a node of this run may not come back; once, unless it was let in again since."""
        if self._admitted.pop(node, None):
            await self._write(self._store.record, tell=entries.revoked(node))

    def opens(self, round_: int, attempt: int, late: Iterable[Task], now: float) -> None:
        """A try of a round begins, or goes on after another server left it; some nodes are at work for earlier ones."""
        self._round, self._opened = round_, time.time()
        self._asked = {task[:2]: self._asked.get(task[:2], now) for task in late} | {(round_, attempt): now}
        self._verdicts = {key: told for key, told in self._verdicts.items() if told[0] >= round_ - 1}
        self.spoils = {one for one in self.spoils if one.round >= round_ - 1}
        self._noise.clear()

    async def opened(self, round_: int, attempt: int, cohort: Sequence[str], late: Mapping[str, Task] = {}) -> None:
        """Store who was asked in a round, and who is at work for an earlier one, so that another server can go on with it."""
        self._ended = False
        facts: dict[str, Any] = {"round": round_, "attempt": attempt, "cohort": list(cohort)}
        if late:
            facts["late"] = {node: [task.round, task.attempt] for node, task in late.items()}
        await self._write(self._store.open_round, self._run, facts, tell=entries.opened(facts))

    def arrived(self, record: Record, weight: float, metrics: Metrics, norm: float | None, now: float) -> None:
        """A verified update is in the log."""
        run, round_, attempt, node = address = record.envelope.address
        if address not in self._arrivals:
            row = UpdateRow(
                run, round_, attempt, node, "accepted", record.envelope.digest, record.envelope.size,
                now - self._asked.get((round_, attempt), now), weight, "", record.position, -1, metrics, norm,
            )  # fmt: skip
            self._arrivals[address] = _Arrival(record.envelope, row)

    def accepted(self, command: Close, read: Callable[[Envelope], Buffer]) -> list[Accepted]:
        """Return the updates that a round is made of, in the order of the fold; `read` gives their bytes."""
        found = []
        for node in command.accepted:
            body = partial(read, self._arrivals[command.address(self._run, node)].envelope)
            round_, started = (task.round, task.model) if (task := command.late.get(node)) else (command.round, "")
            found.append(Accepted(node, body, command.round - round_, started, round_))
        return found

    async def refused(self, status: Status, judged: Judge) -> None:
        """Something came that doesn't count."""
        address, key = judged.address, (judged.address, judged.digest)
        if (arrival := self._arrivals.get(address)) and arrival.envelope.digest == judged.digest:
            del self._arrivals[address]
        if judged.digest and key in self._refused:  # it comes again
            return
        if not judged.offence:  # of these there is one a try; of updates for rounds that are not, a node may sign any number
            self._noise[address.node] += 1
            if self._noise[address.node] > NOISE:
                return
        row = UpdateRow(
            *address, status, judged.digest, judged.size, reason=judged.reason, norm=judged.norm, offence=judged.offence
        )
        self._refused.add(key)
        try:
            await self._write(self._store.record_update, row, tell=entries.refused(row))
        except BaseException:
            self._refused.discard(key)  # it isn't stored: when it comes again, it has to be
            raise

    async def spoilt(self, judged: Judge) -> bool:
        """A body came that the log didn't take; once an address, since a node may sign any number of digests for one."""
        if judged.address in self.spoils:
            return False
        self.spoils.add(judged.address)
        await self.refused("rejected", judged)
        return True

    def judged(self, address: Address, digest: str, accepted: bool, reason: str) -> Verdict:
        """Remember, and return, what a node is told of its update; it may have to be told again."""
        verdict = Verdict(
            run=address.run,
            round=address.round,
            attempt=address.attempt,
            digest=digest,
            accepted=accepted,
            reason=reason[:2000],
        )
        self._verdicts[address, digest] = self._round, verdict
        return verdict.model_copy(update={"head": self.head})

    def verdict(self, address: Address, digest: str) -> Verdict | None:
        """What was said of an update in this round or the one before."""
        _, verdict = self._verdicts.get((address, digest), (0, None))
        return verdict and verdict.model_copy(update={"head": self.head})

    async def close_round(
        self, command: Close, made: Made, holdout: Metrics | None, now: float, hidden: Metrics | None = None
    ) -> dict[str, Any]:
        """Store a closed round in one transaction; return its facts for people.

        With `hidden`, the sums of the updates' metrics, nothing is known of what each node's model does.
        """
        addresses = [command.address(self._run, node) for node in command.accepted]
        cosines = made.drift.cosines if made.drift else [None] * len(addresses)
        rows = [
            replace(
                self._arrivals[one].row, place=place, folded=command.round if one.node in command.late else None,
                cosine=_number(cosine),
            )
            for place, (one, cosine) in enumerate(zip(addresses, cosines, strict=True))
        ]  # fmt: skip
        row = RoundRow(
            self._run, command.round, command.attempt, self._opened, now - self._asked[command.round, command.attempt],
            made.model, made.state,
            command.cohort, len(rows), sum(one.bytes for one in rows), command.registered, made.reference,
            made.noise, made.epsilon, _number(made.drift.dissimilarity) if made.drift else None, self._fetched,
        )  # fmt: skip
        self._fetched = 0
        # Nodes judge the model they receive: the one that the round before theirs made.
        if hidden is None:
            everywhere, apart = await asyncio.to_thread(_judged, {one.node: one.metrics for one in rows if not one.folded})
            evaluations = [EvaluationRow(self._run, command.round - 1, SPREAD, apart)]
            evaluations += [EvaluationRow(self._run, one.round - 1, one.node, pooled([one.metrics])) for one in rows]
        else:
            everywhere, evaluations = pooled([named(hidden, [one.metrics for one in rows])]), []
        evaluations.append(EvaluationRow(self._run, command.round - 1, "nodes", everywhere))
        if holdout is not None:
            evaluations.append(EvaluationRow(self._run, command.round, "holdout", holdout))
        await self._write(self._store.close_round, row, rows, evaluations, tell=entries.closed(row, rows))
        self._closed = command.round
        self.counted |= command.accepted
        for one in addresses:
            del self._arrivals[one]
        return {
            "round": command.round,
            "answered": [self.names[one.node] for one in rows],
            "late": {self.names[node]: command.round - task.round for node, task in command.late.items()},
            "cohort": command.cohort,
            "bytes": row.bytes,
            "fetched": row.fetched,
            "seconds": row.seconds,
            "model": made.model,
            "judged": summary(holdout if holdout is not None else everywhere),
            "by": "holdout" if holdout is not None else "nodes",
            **({} if made.epsilon is None else {"epsilon": made.epsilon}),
        }

    def fetched(self, size: int) -> None:
        """So many bytes of models are on their way to whoever asked."""
        self._fetched += size

    async def judged_first(self, metrics: Metrics) -> None:
        """Store how the initial model does on the holdout."""
        await self._write(self._store.record_evaluation, EvaluationRow(self._run, 0, "holdout", metrics))

    async def farewell(self, node: str, metrics: Metrics) -> None:
        """Store how the final model, which the last closed round made, does on a node's rows, and on all nodes' rows so far."""
        if not metrics:  # how a node's model does is its own affair
            return
        self._farewells[node] = metrics
        self._summed.discard(node)
        await self._write(self._store.record_evaluation, EvaluationRow(self._run, self._closed, node, dict(metrics)))
        async with self._summing:  # thousands may go at once: whoever comes while others are added up is in the next sum
            if node in self._summed:
                return
            said = {one: self._farewells[one] for one in sorted(self._farewells, key=self.names.__getitem__)}
            everywhere, apart = await asyncio.to_thread(_judged, said)
            for place, found in (("nodes", everywhere), (SPREAD, apart)):
                await self._write(self._store.record_evaluation, EvaluationRow(self._run, self._closed, place, found))
            self._summed |= said.keys()

    async def ends(self, outcome: str, reason: str) -> None:
        """Tell the record how the run ends, so that the goodbye to nodes carries it; a store that fails mutes no goodbye."""
        if not self._ended:
            with contextlib.suppress(StoreError):  # `end` tells it then, or says that it can't
                await self._try_to_write(self._store.record, tell=entries.ended(outcome, reason))
                self._ended = True

    async def end(self, outcome: str, reason: str) -> None:
        """Store how the run ended."""
        entry = None if self._ended else entries.ended(outcome, reason)
        await self._write(self._store.end_run, self._run, outcome, reason, time.time(), tell=entry)
        self._ended = True

    def close(self) -> None:
        """Wait for the last write."""
        self._worker.shutdown()


def _judged(by_node: Mapping[str, Metrics]) -> tuple[dict[str, float], dict[str, Any]]:
    """The sums of all nodes' rows, and how far apart the nodes' own figures lie."""
    return pooled(by_node.values()), spread({node: summary(sums) for node, sums in by_node.items()})


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _settle(done: asyncio.Future[None], fault: Exception | None) -> None:
    if done.done():  # whoever waited is gone
        return
    if fault:
        done.set_exception(fault)
    else:
        done.set_result(None)
