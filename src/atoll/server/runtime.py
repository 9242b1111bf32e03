"""The server at work: what the machine decides, done. What nodes say comes to `guests`; `served` is what others may ask for.

Its methods, and those there, carry the names of the talk that Atoll grew from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from atoll import learners
from atoll.chain import Chain
from atoll.drive import Drive, new_loop, on_signals
from atoll.errors import AtollError, GaveUpError, PlanError, PrivacyError, RefusedError, StoreError
from atoll.keys import Identity, new_secret
from atoll.learner import Learner, Rows
from atoll.logs import access
from atoll.messages import Connect, ConnectionReceived, EndSession, StartTraining
from atoll.plan import Plan
from atoll.server import events, machine, served, tries, web
from atoll.server.aggregate import Aggregator
from atoll.server.agreed import agreed
from atoll.server.book import Book, Made
from atoll.server.channel import MESSAGE_LIMIT, Channel
from atoll.server.close import Guard, folded, opened
from atoll.server.door import Door
from atoll.server.guests import Guests
from atoll.server.intake import Intake
from atoll.server.linked import Linked
from atoll.server.log import open_log, open_sums
from atoll.server.patience import Patience
from atoll.server.resume import unfinished
from atoll.server.retention import Quota
from atoll.server.state import State as RunState
from atoll.server.state import admits
from atoll.server.status import status
from atoll.store import RunRow
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.store.viewers import Viewers
from atoll.tls import authority, required
from atoll.vector import Groups, Metrics, Total
from atoll.wire import Address

log = logging.getLogger("atoll.server")
PORT = 8740
Watch = Callable[[Mapping[str, Any]], None]
"""Told of what a person would like to see: a mapping with `what` ("round", "joined", …) and facts."""


class Server:
    """Coordinates one run of a plan, and stores its history.

    Args:
        plan: what everyone agreed to.
        holdout: the server's own test rows; without them models are judged by the nodes' pooled metrics.
        store: the directory of history, models and the embedded log.
        host, port: where to listen; port 0 takes a free one.
        tls: speak TLS, by a CA made in the store on first use, or by (certificates, key) of your own, two PEM files.
        insecure: let other machines in without TLS.
        kafka_config: a file that says by what Kafka knows this server, where the plan's updates go there.
        client_certificates: let in only clients with a certificate by the store's CA (`atoll keys certificate`).
        watch: told of each thing that a person would like to see.
        learner: one of your own, in place of the one that the plan names; nodes need the same.
        quota: the most bytes that the store may take.
        start: a model to begin with, a `.safetensors` or `.keras` file or groups; else a new one by the plan's seed.
        allow: functions ("package.module:function") that the plan may name here, beside those of installed packages.
        resume: go on with the newest run of this plan that isn't done, where a server that died or was stopped left it.

    Raises:
        AtollError: the plan can't be carried out, or the store or the port can't be had.
    """

    def __init__(  # noqa: PLR0913  all but the plan by their names
        self,
        plan: Plan,
        *,
        holdout: Rows | None = None,
        store: str | Path = "atoll-store",
        host: str = "127.0.0.1",
        port: int = PORT,
        watch: Watch | None = None,
        learner: Learner | None = None,
        quota: int | None = None,
        start: learners.Start | None = None,
        allow: Collection[str] = (),
        resume: bool = False,
        tls: bool | tuple[Path, Path] = False,
        insecure: bool = False,
        kafka_config: str | Path | None = None,
        client_certificates: bool = False,
    ) -> None:
        if resume and start is not None:
            raise PlanError("--start and --resume exclude each other: a run goes on from its own newest model; leave one out")
        self.plan, self.directory = plan, Path(store)
        self.agreed = agreed(plan, learner, allow, holdout)
        first = learners.first(plan, self.agreed.learner, start)
        if client_certificates and not tls:
            raise AtollError("--client-certificates is a part of TLS: add --tls, or --tls-cert and --tls-key")
        known_by = access.read(Path(kafka_config) if kafka_config else None)
        self.certificate = required(tls, self.directory / "tls", host, insecure=insecure)
        self._clients = authority(self.directory / "tls") if client_certificates else None
        with contextlib.ExitStack() as opened:  # what is open is closed again where the next thing can't be had
            self._listener = opened.enter_context(web.bind(host, port))
            self.store = SqlStore(self.directory)
            opened.callback(self.store.close)
            self.identity = Identity.at(self.directory / "server.key")
            self._left = unfinished(self.store, plan, self.identity) if resume else None
            self.run = self._left.row.run if self._left else f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            self.models, self.quota = Models(self.directory / "models"), Quota(self.directory, self.store, quota)
            self.door, self.viewers = Door(self.directory, self.run), Viewers(self.directory)
            opened.callback(self.door.close)
            opened.callback(self.viewers.close)
            self.log = open_log(plan, self.directory / "log", self.run, self.agreed.size, self.quota.room, self._left, known_by)
            self._opened = opened.pop_all()
        self.guests = Guests(self, self._tell)
        self.channel = Channel(self.connect, self.guests, self.run)
        self.url = f"{'https' if self.certificate else 'http'}://{host}:{self._listener.getsockname()[1]}"
        self._watch: Watch = watch or (lambda _: None)
        chain = Chain(self.identity, self.run, plan.digest, self._left and self._left.last)
        self.patience = Patience(plan.cohort.deadline, lambda why: self._tell("waiting", reason=why))
        self.book = Book(self.store, chain, self.run, self.patience, self._left)
        noises = [row.noise for row in self.store.rounds(self.run)]
        self.aggregator = Aggregator(self.agreed, self.models, holdout, noises)
        self._begin(first)
        self._make_room(plan.cohort.minimum)
        self._ended, self._opening = asyncio.Event(), asyncio.Lock()
        self.drive, self.intake = self._driving()

    def _driving(self) -> tuple[Drive[RunState], Intake]:
        """Return the machine, not yet in motion, and what hands it the log's updates."""
        acts = dict[type, Callable[[Any], Awaitable[None]]]()
        drive: Drive[RunState] = Drive(machine.transition, acts, self._failed)
        self.sums = open_sums(self.agreed, self.directory, self.run, self.quota.room)
        self.linked = self.agreed.link and Linked(
            self.agreed.link,
            self.agreed,
            self.run,
            drive,
            self.channel,
            self._add,
            self.models,
            self.directory,
            self.patience,
            self._tell,
            self.sums,
        )
        intake = Intake(
            self.agreed,
            self.log,
            drive=drive,
            book=self.book,
            channel=self.channel,
            door=self.door,
            aside=(self.directory, self.quota.room),
            tell=self._tell,
            closed=self._left.past.closed if self._left else 0,
        )
        acts |= {
            events.Train: self._train,
            events.Judge: intake.judge,
            events.Close: self._close,
            events.End: self.end_session,
            events.Wake: self._wake,
            events.Finish: self._finish,
        }
        if self.linked:
            acts |= {events.Collect: self.linked.collect, events.Say: self.linked.say}
        return drive, intake

    def _begin(self, first: Groups) -> None:
        """Store the run and its first state; or take up the last one that another server left."""
        if self._left:
            self.book.goes_on(self._left)
            self.aggregator.take_up(self.agreed.algorithm.init(first), self._left.past.model, self._left.state)
            return
        model = self.aggregator.begin(first)
        about = self.plan.plan.name, self.plan.digest, self.plan.to_json()
        self.book.begins(RunRow(self.run, *about, time.time(), model, log_start=self.log.positions))

    def serve(self) -> dict[str, Any]:
        """Serve the run to its end, and return its history.

        Raises:
            GaveUpError: it ended before its last round; everything up to there is stored.
        """
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(self.serve_async())

    async def serve_async(self) -> dict[str, Any]:
        """Do as `serve`, inside a running event loop."""
        now, model = self.drive.now(), self.aggregator.kept[0]
        rules: Any = {"late": self.agreed.algorithm.late is not None, "secret": new_secret()}
        rules["steps"] = self.linked.steps if self.linked else events.NO_STEPS
        if self._left:
            past = self.linked.takes_up(self._left.past) if self.linked else self._left.past
            self.drive.state, commands = machine.resume(self.run, self.plan, past, now, spent=self.aggregator.over(), **rules)
            self.book.opens(self.drive.state.round, self.drive.state.attempt, self._left.past.tasks.values(), now)
        else:
            self.drive.state, commands = machine.begin(self.run, self.plan, model, now, **rules)
        # Who is still taking the final model has as long for it as a round may last.
        site = web.Web(served.app(self), self.certificate, MESSAGE_LIMIT, self.plan.cohort.deadline, self._clients)
        serving = asyncio.create_task(site.serve(sockets=[self._listener]))
        self.drive.spawn(self.consume_updates())
        self.drive.spawn(self.channel.pulse())
        self.drive.spawn(self.door.watch(self.guests.revoke))
        try:
            with on_signals(self.stop):
                log.info("run %s of plan %s: listening on %s", self.run, self.plan.plan.name, self.url)
                about: dict[str, Any] = {"run": self.run, "minimum": self.plan.cohort.minimum, "key": self.identity.public.hex()}
                pin = self.certificate and self.certificate.pin
                self._tell("listening", url=self.url, pin=pin, **about)
                if not self._left and (first := await asyncio.to_thread(self.evaluate)) is not None:
                    await self.book.judged_first(first)
                await self.drive.begin(self.drive.state, commands)
                await self._ended.wait()
        finally:
            await self.channel.close()
            site.should_exit = True
            await serving
            await asyncio.gather(*(one.close() for one in (self.log, self.sums) if one))
            self.drive.stop()
            self.book.close()
            history = self.store.history(self.run)
            self._opened.close()
        self._tell("ended", outcome=self.drive.state.outcome, reason=self.drive.state.reason)
        if self.drive.state.outcome == "gave_up":
            raise GaveUpError(f"{self.drive.state.reason}; what was done until then is in {self.directory}", run=self.run)
        return history

    async def connect(self, message: Connect, node: str) -> ConnectionReceived:
        """Admit a node, or refuse it."""
        if message.plan != self.plan.digest:
            raise RefusedError(f"the node agreed to plan {message.plan[:12]}, this run's is {self.plan.digest[:12]}: join again")
        if self.plan.privacy.roster is not None and node not in self.plan.privacy.roster:
            raise RefusedError(f"node {node} is not in the plan's roster (privacy.roster), so no sum takes it in")
        await self.door.admit(message)
        await asyncio.to_thread(self.log.follow, node)
        if self.book.taken(node, message.name):  # from here to where the name is kept nobody else gets a turn
            raise RefusedError(f"the name '{message.name}' belongs to another node of this run; choose another --name")
        await self.book.saw(node, message.name, message.key)
        run: Any = {"run": self.run, "plan": self.plan.digest, "rounds": self.plan.plan.rounds, "round": self.drive.state.round}
        run["held_out"] = self.drive.state.conduct.until.get(node, 0)
        return ConnectionReceived(**run, key=self.identity.public.hex(), head=self.book.head)

    # What the log brings.

    async def consume_updates(self) -> None:
        """Read the log, verify each update on arrival, and hand it to the machine."""
        async for record in self.log.records():
            await self.intake.take(record)

    # What the machine decides.

    async def _train(self, command: events.Train) -> None:
        if self.linked and not command.again:
            self.linked.opens(command.round, command.attempt, command.model)
        self.drive.spawn(self.start_round(command))  # beside what else happens: the store may have to be waited for

    async def start_round(self, command: events.Train) -> None:
        """Ask nodes to train the present model."""
        async with self._opening:
            if not command.again:
                self.book.opens(command.round, command.attempt, command.late.values(), self.drive.now())
                # Before anybody is asked: what comes back must find its round, even in another server.
                await self.book.opened(command.round, command.attempt, command.nodes, command.late)
        run = self.drive.state
        if run.outcome or (not command.again and (run.round, run.attempt) != (command.round, command.attempt)):
            return  # it took so long that the round is over
        self._tell("asked", round=command.round, nodes=command.nodes)
        task = StartTraining(
            run=self.run, round=command.round, attempt=command.attempt, model=command.model, deadline=command.seconds
        )
        await self._tell_each(command.nodes, task)

    async def end_session(self, command: events.End) -> None:
        """Tell nodes that the run is over."""
        await self.book.ends(command.outcome, command.reason)
        model = self.drive.state.model if self.drive.state.round > 1 or command.outcome == "completed" else None
        end = EndSession(
            run=self.run,
            rounds=self.plan.plan.rounds,
            model=model,
            outcome=command.outcome,
            reason=command.reason[:2000],
            head=self.book.head,
        )
        await self._tell_each(command.nodes, end)

    async def _tell_each(self, nodes: Collection[str], message: StartTraining | EndSession) -> None:
        """Tell nodes, and each which of its updates was the last to count; those of whom none did are told all at once."""
        await self.channel.tell_all((node for node in nodes if node not in self.book.counted), message)
        for node in nodes:
            if digest := self.book.counted.get(node):
                await self.channel.tell(node, message.model_copy(update={"counted": digest}))

    async def _close(self, command: events.Close) -> None:
        self.drive.spawn(self._closing(command))

    async def _closing(self, command: events.Close) -> None:
        try:
            made = await self.patience.until_stored(partial(asyncio.to_thread, self.aggregate, command))
            judged = await asyncio.to_thread(self.evaluate)
            lost = self.linked.lost if self.linked else {}
            counted = {node: digest for node, digest in command.accepted.items() if node not in lost}
            command = replace(command, accepted=counted)
            run = self.drive.state
            keep = {Address(self.run, *task[:2], node) for node, task in run.tasks.items() if node not in command.accepted}
            facts = await self.store_history(command, made, judged)
            await asyncio.to_thread(self.log.forget, command.round, keep)
            await self.patience.until_stored(partial(asyncio.to_thread, self._make_room, command.registered))
        except PrivacyError as error:  # too few gave what unmasking takes
            await self.drive.happen(events.Abandoned(self.drive.now(), str(error)))
            return
        except Exception as error:  # the run can't go on without this model: say so, and end in order
            log.error("round %d can't be closed: %s", command.round, error, exc_info=not isinstance(error, AtollError))  # noqa: TRY400
            await self.drive.happen(events.Broken(self.drive.now(), f"round {command.round} can't be closed: {error}"))
            return
        self._tell("round", **facts)
        self.aggregator.noises.append(made.noise)
        await self.drive.happen(events.Closed(self.drive.now(), facts["model"], facts["judged"], self.aggregator.over(), lost))

    def aggregate(self, command: events.Close) -> Made:
        """Fold the accepted updates into the next state, and store it."""
        accepted = self.book.accepted(command, self.log.body)
        return self.aggregator.aggregate(command, accepted, self.drive.state.model, self.linked.guard() if self.linked else None)

    def _add(self, guard: Guard) -> Total:
        """Add up the updates that are in while nobody can read them."""
        command = tries.closing(self.drive.state)
        accepted = self.book.accepted(command, self.log.body)
        return folded(guard, opened(guard.layouts, self.drive.state.model, accepted), command.registered)

    def evaluate(self) -> Metrics | None:
        """Judge the present model on the holdout; None without one."""
        return self.aggregator.evaluate()

    def _make_room(self, nodes: int) -> None:
        """Make room, as far as the quota asks for it, for the updates of so many nodes."""
        self.aggregator.keep_again()  # pruned with the run that made it first, just before this one's row named it
        self.quota.recount(nodes * self.agreed.size)

    async def store_history(self, command: events.Close, made: Made, judged: Metrics | None) -> dict[str, Any]:
        """Store the closed round in one transaction; return its facts."""
        hidden = self.linked.metrics if self.linked else None
        return await self.book.close_round(command, made, judged, self.drive.now(), hidden)

    async def _wake(self, command: events.Wake) -> None:
        self.drive.wake(command.at, events.Tick)

    async def _finish(self, command: events.Finish) -> None:
        self.drive.spawn(self._finishing(command))

    async def _finishing(self, command: events.Finish) -> None:
        try:
            await self.book.end(command.outcome, command.reason)
        except StoreError as error:
            log.warning("how the run ended can't be stored: %s", error)
        self._ended.set()

    def challenge(self) -> str:
        """Return something fresh for a handshake to sign."""
        return self.channel.challenges.new()

    def status(self) -> dict[str, Any]:
        """Return the run's present state as plain values, with what it waits for."""
        arriving = {
            address.node: progress
            for address, progress in self.log.arriving().items()
            if admits(self.drive.state, address) is None
        }
        here = self.drive.state, self.drive.now(), time.time(), self.book.lost, arriving, self.channel.silent()
        told = status(*here, log=self.log.waiting, store=self.patience.waiting)
        return {"plan": self.plan.plan.name, "epsilon": self.aggregator.spent(), **told}

    def stop(self, reason: str = "stopped by the operator") -> None:
        """End the run in order: nodes are told, everything is stored that can be."""
        self.patience.end()
        self.drive.spawn(self.drive.happen(events.Stop(self.drive.now(), reason)))

    def _tell(self, what: str, **facts: Any) -> None:
        self._watch({"what": what, **facts})

    def _failed(self, error: BaseException) -> None:
        log.error("the server can't go on: %s", error, exc_info=None if isinstance(error, AtollError) else error)
        self.drive.spawn(self.drive.happen(events.Broken(self.drive.now(), str(error) or repr(error))))
