"""The clients of a simulated federation: what they train, remember and send, and when it arrives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from atoll.algorithms import Memory
from atoll.compression import Down, Press, parted
from atoll.errors import AtollError, LayoutError
from atoll.learner import Data
from atoll.messages import UPDATE
from atoll.server import events
from atoll.server.offences import length_of
from atoll.server.state import State as Machine
from atoll.simulate.attacks import Tamper
from atoll.simulate.clients import Memories
from atoll.simulate.clock import Clock
from atoll.simulate.linked import Linked
from atoll.simulate.map import Job, Strategy, Work
from atoll.vector import Groups, Update, check, layouts_of
from atoll.wire import Address, digest_of, encode, pack

There = Callable[[int], Collection[str]]
"""Round → the names of the clients that can be asked in it."""
_LARGE = 1 << 14
"""Updates of more numbers than this are taken in by several threads."""


class Given(NamedTuple):
    """The model that clients have, who had the one before it, and how many bytes the step from that takes."""

    model: Groups
    had: frozenset[str]
    step: int | None


class Open(NamedTuple):
    """An update that is in no model yet: its task's round and attempt, what its client will remember, its size and norm."""

    task: tuple[int, int]
    update: Update
    memory: Memory
    size: int
    norm: float | None

    @property
    def said(self) -> dict[str, Any]:
        """What is no array, as plain values."""
        about = {"task": self.task, "weight": self.update.weight, "metrics": dict(self.update.metrics)}
        return {**about, "size": self.size, "norm": self.norm, "remembers": bool(self.memory)}

    @classmethod
    def read(cls, said: Mapping[str, Any], groups: Callable[[str], Groups]) -> Open:
        """Return what was `said`; `groups` gives the arrays of the `update` and the `memory`."""
        update, memory = Update(groups("update"), said["weight"], said["metrics"]), said["remembers"] and groups("memory")
        return cls(tuple(said["task"]), update, memory or {}, said["size"], said["norm"])


@dataclass
class Cohort:
    """All clients of a run.

    Args:
        work, press, down: the plan, its method and learner, and how updates are made small and models get to clients.
        clients: name → rows.
        strategy: how they train.
        clock: when what they say arrives.
        tamper: makes of a round's updates what is sent.
        there: who can be asked in a round; all of them unless given.
        linked: their end of the plan's link, and the server's.
        model, brief: the model that was sent last, its digest and what clients make of it.
        whole, step: how many bytes it takes to fetch that, and to get to it from the one before, where a step does.
        had, have: who has the model before, and who has this one.
        fetched: how many bytes of models clients fetched in the open round.
        drafts: what each remembers once its update counts.
        updates: those that have come and are in no model yet, opened, and their sizes and norms.
    """

    work: Work
    press: Press
    down: Down
    clients: Mapping[str, Data]
    strategy: Strategy
    clock: Clock
    tamper: Tamper | None = None
    there: There | None = None
    linked: Linked | None = None
    model: str = ""
    brief: Groups = field(default_factory=dict)
    whole: int = 0
    step: int | None = None
    had: frozenset[str] = frozenset()
    have: frozenset[str] = frozenset()
    fetched: int = 0
    here: frozenset[str] = frozenset()
    briefs: dict[str, Groups] = field(default_factory=dict)
    memories: Memories = field(default_factory=Memories)
    drafts: dict[str, Memory] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    norms: dict[str, float | None] = field(default_factory=dict)
    threads: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)

    def publish(self, brief: Groups, round_: int = 0) -> None:
        """Make of what the method sends the model that clients receive, as the server does after a round."""
        given, step = self.down.next(brief, self.brief if round_ else None, round_)
        file, words = self.down.file(given)
        parts = pack(file, words)
        if (model := digest_of(parts)) != self.model:
            self.had, self.have = self.have, frozenset()
        self.model, self.whole = model, sum(map(len, parts))
        self.step = sum(map(len, pack(step, {"round": str(round_)}))) if step else None
        self.brief = self.down.received(file, layouts_of(given))

    @property
    def given(self) -> Given | None:
        """What a run that goes on needs of the model, where there are steps to it."""
        return Given(self.brief, self.had, self.step) if self.down.steps else None

    def fetch(self, names: frozenset[str]) -> None:
        """Let clients fetch the model; who has it already doesn't."""
        new = names - self.have
        followed = 0 if self.step is None else len(new & self.had)
        self.fetched += followed * (self.step or 0) + (len(new) - followed) * self.whole
        self.have |= new

    def length(self, name: str) -> int:
        """How many bytes it takes a client to get to the model: a step, where there is one and it has the one before."""
        return self.whole if self.step is None or name not in self.had else self.step

    def train(self, command: events.Train, *, judged: bool) -> list[events.Event]:
        """Let the asked clients train; `judged`: and judge the model that they were sent."""
        task, devices = (command.round, command.attempt), self.clock.devices
        names = [name for name in command.nodes if not (devices and devices.drops(name, task))]
        brief = self.briefs.setdefault(command.model, self.brief)
        self.fetch(frozenset(names))
        clients = {name: (parted(self.memories.get(name))[0], self.clients[name]) for name in names}
        answers = self.strategy.train(Job(brief, command.round, clients, judged and not self.work.algorithm.silent))
        updates: dict[str, Update] = {}
        for name in names:
            address, answer = Address("simulated", command.round, command.attempt, name), answers[name]
            if isinstance(answer, LayoutError):
                raise LayoutError(f"round {command.round}, {name}: {answer}")
            if isinstance(answer, AtollError):
                self.later(name, events.Declined(0.0, address, str(answer)))
                continue
            self.drafts[name], updates[name] = answer
        sent = self.tamper(command.round, updates) if self.tamper and updates else updates
        if self.linked:
            sent = {name: self.pressed(name, command.round, update) for name, update in sent.items()}
            said = self.linked.train(command, sent)
            return said if self.linked.steps.before else self.say(events.Say(UPDATE, tuple(sent)))
        self.send(command.round, command.attempt, sent)
        return []

    def send(self, round_: int, attempt: int, sent: Mapping[str, Update]) -> None:
        """Let updates arrive, each when its client is done with its training."""
        self.updates.update(sent)
        addresses = [Address("simulated", round_, attempt, name) for name in sent]
        size = sum(layout.size for layout in self.work.learner.layouts.values())
        act = self.threads.map if size > _LARGE else map  # a thread's call costs more than a small update's check
        for name, event in zip(sent, act(self.arrive, addresses, sent.values()), strict=True):
            self.later(name, event)

    def say(self, command: events.Say) -> list[events.Event]:
        """Let clients hear what the plan's link says to them."""
        linked = cast("Linked", self.linked)
        if command.phase != UPDATE:
            return linked.say(command)
        protected = {name: linked.protect(name) for name in command.nodes}
        updates = {name: one for name, one in protected.items() if isinstance(one, Update)}
        self.send(*linked.tried, updates)
        return [
            events.Declined(0.0, Address("simulated", *linked.tried, name), one)
            for name, one in protected.items()
            if isinstance(one, str)
        ]

    def collect(self, command: events.Collect) -> list[events.Event]:
        """Let the plan's link go on to its next phase."""
        return cast("Linked", self.linked).collect(command, self.updates, len(self.clients))

    def later(self, name: str, event: events.Appended | events.Refused | events.Declined) -> None:
        """Let a client's word on a task come when it is done."""
        plan = self.work.plan
        steps = plan.training.pace(len(self.clients[name].train), event.address.round, plan.plan.rounds).steps
        self.clock.done(name, steps, self.length(name), self.sizes.get(name, 0), event)

    def pressed(self, name: str, round_: int, update: Update) -> Update:
        """Return a client's update as it is before anything hides it, and let the client remember what it leaves out.

        Raises:
            LayoutError: it is too long.
        """
        small, left = self.press.encode(update.groups, parted(self.memories.get(name))[1], round_, name)
        self.drafts[name] = {**self.drafts[name], **left}
        return replace(update, groups=small)

    def arrive(self, address: Address, update: Update) -> events.Appended | events.Refused | events.Declined:
        """Take an update in as it travels, and check it as a server does; its size is known without joining its bytes."""
        name, layouts = address.node, self.work.algorithm.updates(self.work.learner.layouts)
        try:
            small = update if self.linked else self.pressed(name, address.round, update)
        except LayoutError as error:
            return events.Declined(0.0, address, str(error))
        size = self.sizes[name] = sum(part.nbytes for part in encode(small, self.model))
        what = address, name, size
        if self.linked:  # whatever words they are: they look random
            self.updates[name] = update
            return events.Appended(0.0, *what)
        self.updates[name] = update = replace(update, groups=self.press.decode(small.groups, layouts, address.round))
        try:
            norm = check(update.groups, layouts)
            if self.work.algorithm.verify:
                self.work.algorithm.verify(self.work.learner.layouts, update.groups)
            norm = self.norms[name] = None if self.work.plan.privacy.noise else norm  # as the server does it
            return events.Appended(0.0, *what, length_of(self.work.plan, norm, update.weight, address.round))
        except LayoutError as error:
            return events.Refused(0.0, *what, str(error))

    def presence(self, round_: int) -> list[events.Event]:
        """Let clients come and go before a round."""
        if self.clock.devices and self.clock.devices.come_and_go:
            return self.clock.follow(iter(self.clients))
        names = frozenset(self.there(round_) if self.there else self.clients)
        if unknown := names - self.clients.keys():
            raise AtollError(f"round {round_}: '{min(unknown)}' is there, and no client has that name")
        gone, come = self.here - names, names - self.here
        self.here = names
        now = self.clock.now
        return [*(events.Lost(now, name) for name in sorted(gone)), events.Joined(now, {name: name for name in come})]

    def open(self, server: Machine) -> dict[str, Open]:
        """Return the updates that may yet be in a model."""
        return {
            name: Open(task[:2], self.updates[name], self.drafts[name], self.sizes[name], self.norms.get(name))
            for name, task in server.tasks.items()
            if name in self.updates and name not in server.closing
        }

    def go_on(self, server: Machine, memories: Mapping[str, Memory], opened: Mapping[str, Open]) -> None:
        """Take up what clients remember, and what they have done, in a run that was stopped."""
        self.here = server.present
        for name, memory in memories.items():
            self.memories.put(name, memory)
        self.drafts = {name: {} for name in server.closing}  # what goes with these is remembered already
        for name, one in opened.items():
            self.updates[name], self.drafts[name], self.sizes[name], self.norms[name] = one[1:]

    def forget(self, server: Machine) -> None:
        """Let go of the models that no client works from any longer."""
        asked = {task.model for task in server.tasks.values()}
        self.briefs = {model: brief for model, brief in self.briefs.items() if model in asked}

    def settle(self, name: str) -> None:
        """Let a client remember what goes with its update, now that it counts."""
        if memory := self.drafts.pop(name):
            self.memories.put(name, memory)

    def close(self) -> None:
        """Let go of threads and files."""
        self.threads.shutdown()
        self.memories.close()
