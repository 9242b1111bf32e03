"""What a node does for a task, from the model to the log; what came of it happens to the machine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import aiohttp

from atoll import algorithms
from atoll.algorithms import Memory
from atoll.drive import Drive
from atoll.errors import AtollError, PolicyError, PrivacyError, UnreachableError, UnwritableError
from atoll.letters import written
from atoll.logs import Appender
from atoll.messages import StartTraining
from atoll.node.channel import Channel
from atoll.node.events import Answer, Appended, CannotTrain, Event, Fitted, Protect, Trained, Unanswered
from atoll.node.gate import Gate
from atoll.node.linked import Linked
from atoll.node.machine import State
from atoll.node.outbox import Outbox
from atoll.node.policy import guard_said, guards_of
from atoll.node.sums import Sums
from atoll.node.work import Work
from atoll.plan import Plan
from atoll.store.ledger import Ledger
from atoll.vector import Update
from atoll.wire import Address

log = logging.getLogger("atoll.node")


class Host(Protocol):
    """The node whose tasks they are."""

    drive: Drive[State]
    gate: Gate
    ledger: Ledger
    outbox: Outbox
    channel: Channel
    sums: Sums
    session: aiohttp.ClientSession
    appender: Appender
    plan: Plan
    linked: Linked | None
    work: Work


class Steps(NamedTuple):
    """The node's own part in it.

    Args:
        made: makes a task's update, or trains what its link has to protect: `Tasks.made`, or what stands over it.
        train: fetches the model and trains it.
        send_sum: puts an opened sum where the server finds it by its digest, which is returned.
        address: where a task's update goes.
        tell: told of what a person would like to see.
    """

    made: Callable[[StartTraining], Awaitable[Event]]
    train: Callable[[StartTraining], Awaitable[tuple[Memory, Update]]]
    send_sum: Callable[[StartTraining, bytes], Awaitable[bytes]]
    address: Callable[[StartTraining], Address]
    tell: Callable[..., None]


class Tasks:
    """Does what the server asks for, one task at a time."""

    def __init__(self, node: Host, steps: Steps) -> None:
        self._node, self._steps = node, steps
        self._turn = asyncio.Lock()
        self._fitted: tuple[StartTraining, Memory, Update] | None = None
        self._sealed = ""

    async def fit(self, task: StartTraining) -> None:
        """Make the update, unless the task was replaced meanwhile."""
        drive = self._node.drive
        async with self._turn:  # one at a time; a task that was replaced meanwhile is not begun
            if drive.state.task is not task:
                return
            try:
                self._node.gate.check(task)
                event = await self._steps.made(task)
            except (UnreachableError, UnwritableError) as error:
                self._steps.tell("waiting", reason=str(error))
                await drive.happen(Unanswered(drive.now(), task))
            except AtollError as error:
                await drive.happen(CannotTrain(drive.now(), task, self._said(task, error)))
            except Exception as error:  # a framework's own, in whose words there may be values of rows: they stay here
                log.exception("round %d: training failed", task.round)
                said = f"training failed ({type(error).__name__}); the node's own log says more"
                await drive.happen(CannotTrain(drive.now(), task, said))
            else:
                await drive.happen(event)

    async def made(self, task: StartTraining) -> Event:
        """Return that the update for a task is made; what its link has to protect is only trained."""
        node = self._node
        if (kept := node.outbox.kept(self._steps.address(task))) and self._may_leave(task, kept):
            return Trained(node.drive.now(), task, kept)
        if node.ledger.sent(task.run, task.round, task.attempt):  # another one would be noise drawn anew, for the same numbers
            raise PrivacyError(f"the update of attempt {task.attempt} of round {task.round} left already, and is made once")
        if self._fitted is None or self._fitted[0] != task:
            memory, update = await self._steps.train(task)
            if node.linked is None:
                return Trained(node.drive.now(), task, await self._seal(task, memory, update))
            self._fitted = task, memory, update
        return Fitted(node.drive.now(), task)

    def _may_leave(self, task: StartTraining, kept: str) -> bool:
        """Say whether a kept update may leave as it is: one that another process made may be of other rows than today's.

        Where its noise follows from the rows, the ledger would note the wrong one; unless it has it already.
        """
        by_rows = self._node.plan.privacy.example_noise
        known = by_rows is None or by_rows.rows is not None or kept == self._sealed
        return known or self._node.ledger.sent(task.run, task.round, task.attempt)

    async def _seal(self, task: StartTraining, memory: Memory, update: Update) -> str:
        self._sealed = await asyncio.to_thread(self._node.work.seal, task, memory, update)
        return self._sealed

    async def answer(self, command: Answer) -> None:
        """Say what the link answers in a phase."""
        node, task, phase = self._node, command.task, command.phase
        if node.linked is None:
            return
        try:
            node.gate.check(task)
            digest, body = node.linked.shown(phase, command.body)
            sums = await node.sums.fetch(node.session, task, digest, node.linked.layouts) if digest else None
            answer = await asyncio.to_thread(node.linked.answer, task, phase, body, sums)
            if sums is not None:
                answer = await self._steps.send_sum(task, answer)
        except AtollError as error:
            said = f"phase '{phase}': {self._said(task, error)}"
            await node.drive.happen(CannotTrain(node.drive.now(), task, said))
            return
        for part in written(task.run, task.round, task.attempt, phase, answer):
            await node.channel.say(part)

    async def protect(self, command: Protect) -> None:
        """Protect what was trained, and seal it."""
        node = self._node
        if node.linked is None or self._fitted is None or self._fitted[0] != command.task:
            return
        (task, memory, update), self._fitted = self._fitted, None
        try:
            mine = algorithms.voiced(node.work.algorithm, update)
            hidden = await asyncio.to_thread(node.linked.protect, task, command.body, mine)
            digest = await self._seal(task, memory, hidden)
        except AtollError as error:
            await node.drive.happen(CannotTrain(node.drive.now(), task, self._said(task, error)))
        else:
            await node.drive.happen(Trained(node.drive.now(), task, digest))

    async def send(self, task: StartTraining) -> None:
        """Append the kept update to the log: into the ledger first, then out."""
        node = self._node
        try:
            envelope, path = node.outbox.take(self._steps.address(task))
            spent = node.gate.spent(task)
            node.ledger.leaving(envelope, time.time(), guard_said(node.plan), spent, node.gate.release)
            await node.appender.append(envelope, path)
        except (UnreachableError, UnwritableError) as error:
            self._steps.tell("waiting", reason=str(error))
            await node.drive.happen(Unanswered(node.drive.now(), task))
        except AtollError as error:
            await node.drive.happen(CannotTrain(node.drive.now(), task, str(error)))
        else:
            self._steps.tell("sent", round=task.round, bytes=envelope.size)
            await node.drive.happen(Appended(node.drive.now(), task))

    def _said(self, task: StartTraining, error: AtollError) -> str:
        """Return why nothing comes, for the server: where its plan hides updates, words that rows decide stay here."""
        plan = self._node.plan
        if isinstance(error, PolicyError | PrivacyError) or not (guards_of(plan) or plan.privacy.noise):
            return str(error)
        log.warning("round %d: %s", task.round, error)
        return "its rows and this model can't go together; the node's own log says why"
