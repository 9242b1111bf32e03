"""The node at work: what the machine decides, done beside the data. Its methods carry the names of the talk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from atoll.algorithms import Memory
from atoll.drive import Drive, new_loop, on_signals
from atoll.errors import (
    AtollError,
    GaveUpError,
    PolicyError,
    PrivacyError,
    RefusedError,
    StoreError,
    UnreachableError,
    UnwritableError,
)
from atoll.keys import Identity
from atoll.learner import Data, Learner, summary
from atoll.logs import access
from atoll.messages import ConnectionReceived, Decline, EndSession, Letter, Message, SessionEnded, Slowed, StartTraining, Verdict
from atoll.node import events, machine
from atoll.node.agree import Own, ready
from atoll.node.channel import Channel
from atoll.node.download import Downloads
from atoll.node.gate import Gate
from atoll.node.hold import Hold
from atoll.node.linked import Linked
from atoll.node.memory import Memories
from atoll.node.offer import first_offer, greeting, offered
from atoll.node.outbox import Outbox, appender
from atoll.node.policy import Policy
from atoll.node.rows import Holding
from atoll.node.sums import Sums
from atoll.node.tasks import Steps, Tasks
from atoll.node.trust import certain
from atoll.node.witness import Witness
from atoll.plan import Plan
from atoll.preprocess import Given
from atoll.privacy.dp.account import account
from atoll.store.ledger import Ledger
from atoll.tls import Trust
from atoll.vector import Metrics, Update
from atoll.wire import HEADER_LIMIT, Address, Buffer, seal

log = logging.getLogger("atoll.node")
Watch = Callable[[Mapping[str, Any]], None]
_STOPPED = "stopped by its owner; an unsent update is kept and goes out when the node joins again"


class Node:
    """Takes part in one run, beside data that stays here.

    Args:
        url: the server's, for instance `http://127.0.0.1:8740`.
        data: a file, a folder, a database, arrays `(x, y)` or `(x, y, x_test, y_test)`, a function: see `preprocess.prepare`.
        name: what people call this node; by default it is named after its key.
        directory: where key, ledger, unsent updates and the final model are kept.
        watch: told of each thing that a person would like to see.
        plan: digest of the one plan to take part in; None takes part in whatever plan the server has.
        policy: what the owner agrees to, or the TOML file that says it; None agrees to whatever the plan says.
        learner: one of your own, in place of the one that the plan names.
        allow: functions ("package.module:function") that a plan may name here, beside those of installed packages.
        pin, ca: whom to believe at an https:// address: who holds the key with this pin, or has a certificate of this CA.
        token: what an operator's `atoll nodes add` showed, to join by `name` for the first time.
        kafka_config: a file that says by what Kafka knows this node, where the plan's updates go there.
        certificate: a PEM file with a key and its certificate, for a server that asks for one.

    Raises:
        AtollError: the directory, the pin or the CA's file can't be used.
    """

    def __init__(  # noqa: PLR0913  all but address and rows by their names
        self,
        url: str,
        data: Given,
        *,
        name: str | None = None,
        directory: str | Path = "atoll-node",
        watch: Watch | None = None,
        plan: str | None = None,
        policy: Policy | str | Path | None = None,
        learner: Learner | None = None,
        allow: Collection[str] = (),
        pin: str | None = None,
        ca: str | Path | None = None,
        token: str | None = None,
        kafka_config: str | Path | None = None,
        certificate: str | Path | None = None,
    ) -> None:
        self.url, self.directory = url.rstrip("/"), Path(directory)
        self._tls = certain(Trust(pin, Path(ca) if ca else None, Path(certificate) if certificate else None), self.url)
        self._access = access.read(Path(kafka_config) if kafka_config else None)
        self.identity = Identity.at(self.directory / "node.key")
        self.name = name or f"node-{self.identity.node[:8]}"
        self.ledger, self.outbox = Ledger(self.directory), Outbox(self.directory / "outbox")
        self.gate, self._hold = Gate(policy, self.ledger), Hold(self.directory)
        self.memories = Memories(self.directory / "memory")
        self.witness, self.downloads = Witness(self.directory, url, self.ledger), Downloads(self.url, self.directory / "model")
        self.sums = Sums(self.url, Downloads(self.url, self.directory / "sum"), lambda: self.drive.state.task, self._tell)
        self.run: str | None = None
        self.metrics: dict[str, float] = {}
        self.kept = False
        self._told_of: tuple[int, int, str] | None = None
        self._agreed, self._own, self._allow, self._token = plan, learner, allow, token
        self._watch: Watch = watch or (lambda _: None)
        self.holding = Holding(data, self.directory, self._tell)
        acts: Mapping[type, Callable[[Any], Awaitable[None]]] = {
            events.Dial: self.connect,
            events.Train: self.fit,
            events.Answer: self._answer,
            events.Protect: self._protect,
            events.Append: self.send_updates,
            events.Say: self._say,
            events.Refuse: self._refuse,
            events.Settle: self._settle,
            events.Take: self._take,
            events.Wake: self._wake,
            events.Leave: self._leave,
        }
        self.drive: Drive[machine.State] = Drive(machine.transition, acts, self._fail)
        self.linked: Linked | None = None
        self.tasks = Tasks(self, Steps(self._made, self._train, self._send_sum, self._address, self._tell))
        hears: Mapping[type[Message], Callable[[Any], Awaitable[None]]] = {
            ConnectionReceived: self.connection_received,
            StartTraining: self.start_training,
            Letter: self.link,
            Verdict: self._judged,
            EndSession: self.end_session,
            Slowed: self._slowed,
        }
        self.channel = Channel(self.url, self._tls, hears=hears, check=self._check, lost=self._lost, failed=self._fail)

    def start(self) -> EndSession:
        """Take part to the end of the run.

        Raises:
            AtollError: the server refuses this node, or the data doesn't fit the plan.
            GaveUpError: the run ended early, or the server stayed away for too long.
        """
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(self.start_async())

    async def start_async(self) -> EndSession:
        """Do as `start`, inside a running event loop."""
        async with self._open():
            await self._unless_over(self._agree())
            await self.drive.begin(*machine.begin(self.plan.cohort.deadline, self.linked.first if self.linked else None))
            end = await self._over
        if end is None:
            raise GaveUpError(f"{self.url}: the server stayed away for {self.plan.cohort.deadline:.0f} s; join again later")
        if end.outcome == "gave_up":
            raise GaveUpError(f"the run gave up: {end.reason}")
        return end

    def check(self) -> Data:
        """Read the server's plan and make this node's rows ready for it, as for a run; nothing is sent.

        Raises:
            AtollError: the data doesn't fit the plan, or no server answers.
        """

        async def checking() -> Data:
            async with self._open():
                await self._unless_over(self._agree())
            if self.gate.shut:
                raise PolicyError(self.gate.shut)
            return self.data

        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(checking())

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        self._hold.take()
        self._over: asyncio.Future[EndSession | None] = asyncio.get_running_loop().create_future()
        patience = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
        async with aiohttp.ClientSession(timeout=patience, connector=aiohttp.TCPConnector(ssl=self._tls)) as self.session:
            try:
                with on_signals(lambda: self._fail(GaveUpError(_STOPPED))):
                    yield
            finally:
                await self.disconnect()

    async def _unless_over(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work, and break it off where the owner stops the node meanwhile."""
        task = asyncio.create_task(work)
        await asyncio.wait((task, self._over), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.holding.stop()
            task.cancel()
            await self._over
        await task

    async def _agree(self) -> None:
        """Read the plan, and make ready what it needs, before anything is promised to the server."""
        offer = await first_offer(self.session, self.url, lambda why: self._tell("waiting", reason=why))
        self.plan = Plan.of(offer["plan"], source=f"{self.url}: plan")
        if self._agreed not in (None, self.plan.digest):
            raise RefusedError(f"{self.url} runs plan {self.plan.digest[:12]}, this node takes part in {self._agreed} only")
        self.run = offer["run"]
        if why := self.gate.meets(self.plan):  # the server is told when it asks; nothing is read or built for it
            self._tell("refused", reason=why)
            return
        mine = self.holding, self.name, self.identity, self.directory, self.ledger, self.outbox, self.memories
        own = Own(self._own, self._allow, lambda: self.gate.policy.roster, *mine)
        self.learner, self.algorithm, self.linked, self.data, self.work = await ready(self.plan, own)
        self.appender = await appender(self.plan, self.url, self.session, self.identity.node, self._access)
        train, test = len(self.data.train), len(self.data.test)
        self.gate.rows, self.gate.judged = train, len(self.data.judge)
        self.gate.account = await asyncio.to_thread(account, self.plan, train)
        self._tell("ready", plan=self.plan.plan.name, rounds=self.plan.plan.rounds, train=train, test=test)

    # What the server says.

    def _check(self, message: Message) -> Message:
        return self.witness.heard(message, self.plan.digest)

    async def connection_received(self, message: ConnectionReceived) -> None:
        """The server has let this node in."""
        self._tell("connected", run=message.run, round=message.round)
        if message.held_out >= message.round:
            self._tell("held_out", until=message.held_out)
        await self.drive.happen(events.Connected(self.drive.now()))

    async def start_training(self, task: StartTraining) -> None:
        """The server asks for an update."""
        if task.run != self.run:
            raise PrivacyError(f"it asks for an update to run {task.run}, and said that this is {self.run}: nothing is made")
        await self.drive.happen(events.Asked(self.drive.now(), task))

    async def link(self, part: Letter) -> None:
        """The server says something to the plan's link."""
        if self.linked and (letter := self.linked.take(part)):
            await self.drive.happen(events.Said(self.drive.now(), *letter))

    async def _judged(self, verdict: Verdict) -> None:
        what = verdict.round, verdict.attempt, verdict.digest
        if what != self._told_of:  # it is said again to whoever says that an update is there
            self._tell("verdict", round=verdict.round, accepted=verdict.accepted, reason=verdict.reason)
        self._told_of = what
        await self.drive.happen(events.Judged(self.drive.now(), verdict))

    async def _slowed(self, message: Slowed) -> None:
        self._tell("waiting", reason=f"the server slows this node: {message.reason}")

    async def end_session(self, end: EndSession) -> None:
        """The run is over: the final model is fetched, judged on this node's rows, and saved."""
        await self.drive.happen(events.Told(self.drive.now(), end))

    async def _lost(self, *reason: object) -> None:
        del reason
        if self.drive.state.end is None and not self._over.done():
            self._tell("waiting", reason="the server is away; reconnecting")
        await self.drive.happen(events.Disconnected(self.drive.now()))

    # What the machine decides.

    async def connect(self, command: events.Dial) -> None:
        """Open the control channel; a refusal ends the node."""
        del command
        self.drive.spawn(self._dial())

    async def _dial(self) -> None:
        try:
            offer = await offered(self.session, self.url)
            if offer["digest"] != self.plan.digest:
                raise RefusedError(f"{self.url} runs another plan by now ({offer['digest'][:12]}): join again to take part in it")
            self.run = str(offer["run"])
            hello = greeting(self.identity, self.name, offer, self._token)
            await self.channel.open(hello)
        except UnreachableError as error:
            log.info("not connected: %s", error)
            await self.drive.happen(events.Disconnected(self.drive.now()))

    async def fit(self, command: events.Train) -> None:
        """Fetch the model and train, unless the update for this task was made and kept already."""
        self.drive.spawn(self.tasks.fit(command.task))

    async def _made(self, task: StartTraining) -> events.Event:
        return await self.tasks.made(task)

    async def _answer(self, command: events.Answer) -> None:
        self.drive.spawn(self.tasks.answer(command))

    async def _send_sum(self, task: StartTraining, opened: bytes) -> bytes:
        """Put an opened sum where the server finds it by its digest, which is returned."""
        envelope = seal(self.identity, self._address(task), self.plan.digest, [opened])
        await self.sums.send(self.session, task, envelope, opened)
        return bytes.fromhex(envelope.digest)

    async def _protect(self, command: events.Protect) -> None:
        self.drive.spawn(self.tasks.protect(command))

    async def _train(self, task: StartTraining) -> tuple[Memory, Update]:
        body = await self._model(task.model)
        slow = asyncio.get_running_loop().call_later(2, lambda: self._tell("training", round=task.round))
        try:
            return await asyncio.to_thread(self._work, task, body)
        finally:
            slow.cancel()

    def _work(self, task: StartTraining, body: Buffer) -> tuple[Memory, Update]:
        began = time.monotonic()
        memory, update = self.work.train(task, body)
        self._tell("trained", round=task.round, seconds=time.monotonic() - began, received=summary(update.metrics))
        return memory, update

    async def _model(self, digest: str) -> Buffer:
        limit = sum(layout.nbytes for layout in self.work.layouts.values()) + HEADER_LIMIT
        followed = self.work.followed if self.work.down.steps else None
        return await self.downloads.get(self.session, digest, limit, followed=followed)

    async def send_updates(self, command: events.Append) -> None:
        """Append the kept update to the log: into the ledger first, then out."""
        self.drive.spawn(self.tasks.send(command.task))

    async def _say(self, command: events.Say) -> None:
        await self.channel.say(command.message)

    async def _refuse(self, command: events.Refuse) -> None:
        task = command.task
        self._tell("declined", round=task.round, reason=command.reason)
        self.outbox.drop(self._address(task))
        decline = Decline(run=task.run, round=task.round, attempt=task.attempt, reason=command.reason[:2000])
        if self.gate.shut is None:
            await self.channel.say(decline)
            return
        await self.channel.say_last(decline)
        self._fail(PolicyError(self.gate.shut))

    async def _settle(self, command: events.Settle) -> None:
        verdict = command.verdict
        self.outbox.drop(Address(verdict.run, verdict.round, verdict.attempt, self.identity.node))
        self.ledger.judged(verdict.digest, verdict.accepted, verdict.reason, time.time())

    async def _take(self, command: events.Take) -> None:
        self.drive.spawn(self._taking(command.end))

    async def _taking(self, end: EndSession) -> None:
        told: Metrics = {}
        try:
            if end.model is not None and self.gate.shut is None:
                body = await self._model(end.model)
                figures = await asyncio.to_thread(self.work.keep_final, end, body)
                self.metrics, self.kept = figures, True
                if told := {} if self.linked else self.gate.tells(figures):
                    self.ledger.telling(end.run, self.plan.digest, told, time.time())
        except (UnreachableError, UnwritableError) as error:
            self._tell("waiting", reason=str(error))
            await self.drive.happen(events.NotTaken(self.drive.now()))
            return
        except AtollError as error:
            self._tell("not_kept", reason=str(error))
        if end.outcome == "completed":
            self.memories.forget(end.run)
        await self.channel.say_last(SessionEnded(run=end.run, metrics=dict(told)))
        await self.drive.happen(events.Taken(self.drive.now()))

    async def _wake(self, command: events.Wake) -> None:
        self.drive.wake(command.at, events.Tick)

    async def _leave(self, command: events.Leave) -> None:
        if not self._over.done():
            self._over.set_result(command.end)

    async def disconnect(self) -> None:
        """Hang up, and clean up what only a running node needs."""
        self.drive.stop()
        await self.channel.close()
        with contextlib.suppress(AttributeError):
            await self.appender.close()
        try:
            self.ledger.close()
        except StoreError as error:
            log.warning("what became of the last update isn't in the ledger: %s", error)
        self.holding.close()
        self._hold.leave()

    def _address(self, task: StartTraining) -> Address:
        return Address(task.run, task.round, task.attempt, self.identity.node)

    def _tell(self, what: str, **facts: Any) -> None:
        self._watch({"what": what, **facts})

    def _fail(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)
