"""A whole federation without a socket: the real machines over a simulated network, log, store and clocks, from one seed.

Every message may be late, lost, doubled or overtaken; connections break, one side hears of it later than the other;
server and nodes die at any instant and start again with what they had on disk; the broker goes away; clocks run at their
own speed. What must hold whatever happens is checked all the way: see `Federation.check`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from atoll.messages import EndSession, FlUpdate, StartTraining, Verdict
from atoll.node import events as node_events
from atoll.node import machine as node_machine
from atoll.plan import Plan
from atoll.server import events
from atoll.server import machine as server_machine
from atoll.server.state import State, admits, waiting_for
from atoll.testing.hostile import Hostile
from atoll.testing.stored import RUN, Stored, made
from atoll.testing.world import Faults, World
from atoll.wire import Address


@dataclass
class _Server:
    up: bool = False
    life: int = 0
    state: State | None = None
    since: int = 0
    read: int = 0
    verdicts: dict[tuple[Address, str], Verdict] = field(default_factory=dict)


@dataclass
class _Node:
    name: str
    rate: float
    life: int = 0
    up: bool = False
    state: node_machine.State = field(default_factory=lambda: node_machine.State(0.0))
    connection: int | None = None
    outbox: dict[tuple[int, int], str] = field(default_factory=dict)
    memories: set[str | None] = field(default_factory=lambda: {None})
    counted: set[str] = field(default_factory=set)
    trained: int = 0
    ended: EndSession | None = None


class Federation:
    """One run over a simulated world.

    Args:
        plan: its rounds and its `[cohort]`.
        seed: of everything that happens by chance.
        faults: how unkind the world is.
        nodes: how many there are.
        hostile: how many of these are, see `atoll.testing.hostile`.
        late: whether the algorithm can fold late updates.
        steps: the phases of the plan's link, see `linked_network`.
        embedded: whether the log lives in the server, and goes and says no with it; else it is a broker's.

    Attributes:
        outcome: how the run ended; None while it goes on.
        model: the newest global model, as a digest of all that went into it.
        log: the updates that are durable, in order.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int,
        faults: Faults,
        nodes: int = 5,
        *,
        embedded: bool = False,
        hostile: int = 0,
        late: bool = True,
        steps: events.Steps = events.NO_STEPS,
    ) -> None:
        self.steps = steps
        self.plan, self.faults, self._embedded, self._late = plan, faults, embedded, late
        self.outcome: str | None = None
        self.log: dict[Address, str] = {}
        self._written: list[Address] = []
        self._world = world = World(seed)
        self._connections = itertools.count()
        self._log_away = False
        self._store = Stored()
        self._server = _Server()
        self._rate = world.clock(faults.drift)
        self._nodes = {f"n{k}": _Node(f"node-{k}", world.clock(faults.drift)) for k in range(nodes)}
        self.hostile = Hostile(plan, world, [f"n{k}" for k in range(hostile)])
        self._start_server()
        for node in self._nodes:
            world.later(world.chance.random(), partial(self._start_node, node))

    @property
    def model(self) -> str:
        """The newest global model."""
        return self._store.model

    @property
    def rounds(self) -> int:
        """How many rounds are closed."""
        return len(self._store.closed)

    @property
    def trained(self) -> int:
        """How often nodes trained."""
        return sum(node.trained for node in self._nodes.values())

    @property
    def late(self) -> int:
        """How many updates count in a later round than theirs."""
        return sum(len(closed.late) for closed in self._store.closed)

    def run(self, longest: float) -> None:
        """Let things happen until the run and every node have ended.

        Raises:
            AssertionError: something that must hold doesn't; or it goes on for longer than so many seconds.
        """
        while self._world.next() and (self.outcome is None or any(node.up for node in self._nodes.values())):
            assert self._world.now < longest, f"it hangs: {self._said()}"
        assert self.outcome, f"nothing more will happen: {self._said()}"
        self.check()

    def check(self) -> None:
        """Check what must hold at any time.

        Raises:
            AssertionError: see `Stored.check`; or a node was told that its update counts when it doesn't.
        """
        counted = self._store.check(self.log, self.steps.least or self.plan.cohort.minimum, late=self._late)
        for node in self._nodes.values():
            assert node.counted <= counted, "a node was told that its update counts, and it doesn't"

    def _said(self) -> str:
        state = self._server.state
        return waiting_for(state, self._world.now / self._rate) if state else "the server is away"

    def _after_delay(self, act: Callable[[], None]) -> None:
        self._world.later(self._world.about(self.faults.delay, self.faults.longest), act)

    # The server.

    def _start_server(self) -> None:
        server, store = self._server, self._store
        server.up, server.life, server.read, server.verdicts = True, server.life + 1, 0, {}
        server.since = len(store.closed)
        now = self._world.now / self._rate
        if server.life == 1:
            server.state, commands = server_machine.begin(RUN, self.plan, store.model, now, late=self._late, steps=self.steps)
        else:
            past = self._past(store.past(self.hostile.conduct()))
            for address, digest in store.last():
                self._verdict(address, digest, accepted=True)
            server.state, commands = server_machine.resume(RUN, self.plan, past, now, late=self._late, steps=self.steps)
        self._serve(commands)
        for node in tuple(self.hostile.revoked):
            self._tell_server(partial(events.Revoked, node=node), server.life)
        self._read()

    def _past(self, past: events.Past) -> events.Past:
        """What a server that takes up the run knows of it."""
        return past

    def _kill_server(self) -> None:
        self._server.up, self._server.state = False, None
        for node in self._nodes.values():
            if node.connection is not None:
                self._hangs_up(node, node.connection)
        self._world.later(self._world.about(self.faults.away, self.faults.longest), self._start_server)

    def _tell_server(self, event: Callable[[float], events.Event], life: int) -> None:
        server = self._server
        if not server.up or server.life != life or server.state is None:
            return
        server.state, commands = server_machine.transition(server.state, event(self._world.now / self._rate))
        self._serve(commands)
        if self.outcome is None and self._world.happens(self.faults.dies):
            self._kill_server()
        elif self.outcome is None and self._world.happens(self.faults.revokes):
            self._revoke(self._world.chance.choice(list(self._nodes)))

    def _revoke(self, key: str) -> None:
        """Part with a node, as long as enough others are left."""
        gone = self.hostile.revoked
        if key in gone or len(self._nodes) - len(gone) <= self.plan.cohort.minimum:
            return
        gone[key] = len(self._store.closed)
        if (connection := self._nodes[key].connection) is not None:
            self._hangs_up(self._nodes[key], connection)
        self._tell_server(partial(events.Revoked, node=key), self._server.life)

    def _serve(self, commands: tuple[events.Command, ...]) -> None:
        for command in commands:
            match command:
                case events.Train():
                    self._ask(command)
                case events.Judge(address, digest, accepted):
                    self.hostile.refused(command)
                    verdict = self._verdict(address, digest, accepted=accepted)
                    if not accepted:
                        self._store.refused.add(address)
                    self._to_node(address.node, partial(node_events.Judged, verdict=verdict))
                case events.Close():
                    self._after_delay(partial(self._closed, command, self._server.life))
                case events.End(nodes, outcome):
                    end = EndSession.model_construct(run=RUN, rounds=0, model=self.model, outcome=outcome, reason="")
                    for node in nodes:
                        self._to_node(node, partial(node_events.Told, end=end))
                case events.Wake(at):
                    tick = partial(self._tell_server, events.Tick, self._server.life)
                    self._world.later(max(0.0, at * self._rate - self._world.now) + 1e-6, tick)
                case events.Finish(outcome):
                    self._finish(outcome)

    def _ask(self, command: events.Train) -> None:
        self.hostile.asked(command)
        if not command.again:
            self._store.opens(command)
        task = StartTraining.model_construct(
            run=RUN, round=command.round, attempt=command.attempt, model=command.model, deadline=command.seconds
        )
        for node in command.nodes:
            mine = task.model_copy(update={"counted": self._store.counted(node)})
            self._to_node(node, partial(node_events.Asked, task=mine))

    def _verdict(self, address: Address, digest: str, *, accepted: bool) -> Verdict:
        _, round_, attempt, _ = address
        verdict = Verdict.model_construct(run=RUN, round=round_, attempt=attempt, digest=digest, accepted=accepted, reason="")
        self._server.verdicts[address, digest] = verdict
        return verdict

    def _closed(self, command: events.Close, life: int, lost: Mapping[str, str] = {}) -> None:
        """The fold is done: the round is stored in one step, then the machine hears of it, if it still lives."""
        if not self._server.up or self._server.life != life:
            return
        store = self._store
        store.closes(command)
        self.hostile.closed(command.round, dict(store.updates(command)))
        if self._world.happens(self.faults.dies):
            self._kill_server()
        else:
            self._tell_server(partial(events.Closed, model=store.model, lost=lost), life)

    def _finish(self, outcome: str) -> None:
        self.outcome = outcome
        self._server.up = False
        for node in self._nodes.values():
            if node.connection is not None:
                self._hangs_up(node, node.connection)

    # The log.

    def _append(self, node: _Node, key: str, task: StartTraining, life: int) -> None:
        """One try to append: it may fail before, or after the update is durable."""
        address, digest = Address(RUN, task.round, task.attempt, key), node.outbox[task.round, task.attempt]
        if self._log_away or self._world.happens(self.faults.broken) or (self._embedded and not self._server.up):
            self._tell_node(key, partial(node_events.Unanswered, task=task), life)
            return
        if address not in self.log:
            gone = "revoked" if key in self.hostile.revoked else None
            if self._embedded and self._server.state and (no := gone or admits(self._server.state, address)):
                self._tell_node(key, partial(node_events.CannotTrain, task=task, reason=no), life)
                return
            self.log[address] = digest
            self._written.append(address)
            self._after_delay(self._read)
        if not self._embedded and self._world.happens(self.faults.dies):
            self._log_away = True
            self._world.later(self._world.about(self.faults.away, self.faults.longest), self._log_is_back)
        heard = node_events.Unanswered if self._world.happens(self.faults.broken) else node_events.Appended
        self._after_delay(partial(self._tell_node, key, partial(heard, task=task), life))

    def _read(self) -> None:
        """Bring the server what is in the log, in order."""
        server = self._server
        life = server.life
        while server.up and server.life == life and server.read < len(self._written):
            address = self._written[server.read]
            digest = self.log[address]
            server.read += 1
            late = address.round <= server.since  # in the time of the server before; it may count yet
            if server.state and address.node not in self.hostile.revoked and not (late and admits(server.state, address)):
                self._tell_server(partial(self.hostile.arrives, server.state, address, digest), life)

    def _log_is_back(self) -> None:
        self._log_away = False

    # The nodes.

    def _start_node(self, key: str) -> None:
        node = self._nodes[key]
        if self.outcome is not None:
            return
        node.up, node.life, node.connection = True, node.life + 1, None
        node.state, commands = node_machine.begin(self.plan.cohort.deadline, self.steps.before[0] if self.steps.before else None)
        self._act(key, commands)

    def _kill_node(self, key: str) -> None:
        node = self._nodes[key]
        node.up = False
        if node.connection is not None:
            self._hangs_up(node, node.connection)
        self._world.later(self._world.about(self.faults.away, self.faults.longest), partial(self._start_node, key))

    def _tell_node(self, key: str, event: Callable[[float], node_events.Event], life: int) -> None:
        node = self._nodes[key]
        if not node.up or node.life != life:
            return
        node.state, commands = node_machine.transition(node.state, event(self._world.now / node.rate))
        self._act(key, commands)
        if self._nodes[key].up and self._world.happens(self.faults.dies):  # it may have left
            self._kill_node(key)

    def _act(self, key: str, commands: tuple[node_events.Command, ...]) -> None:
        node = self._nodes[key]
        for command in commands:
            life = node.life
            match command:
                case node_events.Dial():
                    self._after_delay(partial(self._dial, key, life))
                case node_events.Train(task):
                    self._world.later(
                        self._world.about(self.faults.fit, self.faults.longest), partial(self._trained, key, task, life)
                    )
                case node_events.Append(task):
                    self._after_delay(partial(self._append, node, key, task, life))
                case node_events.Say(message):
                    self._to_server(key, partial(self._said_update, key, message))
                case node_events.Settle(verdict):
                    if verdict.accepted:
                        node.counted.add(verdict.digest)
                case node_events.Take(end):
                    self._after_delay(partial(self._take, key, end, life))
                case node_events.Wake(at):
                    tick = partial(self._tell_node, key, node_events.Tick, life)
                    self._world.later(max(0.0, at * node.rate - self._world.now) + 1e-6, tick)
                case node_events.Leave(end):
                    self._leave(key, end)
                case node_events.Refuse(task, reason):
                    address = Address(RUN, task.round, task.attempt, key)
                    self._to_server(key, partial(self._declines, address, reason, self._server.life))

    def _declines(self, address: Address, reason: str, life: int) -> None:
        state = self._server.state
        if state and admits(state, address) is None and not state.answered(address.node):
            self._store.refused.add(address)
            self._tell_server(partial(events.Declined, address=address, reason=reason), life)

    def _dial(self, key: str, life: int) -> None:
        node, server = self._nodes[key], self._server
        if not node.up or node.life != life:
            return
        if server.up and key in self.hostile.revoked:
            node.up = False  # a refusal ends it
            return
        if not server.up or self._world.happens(self.faults.broken):
            self._tell_node(key, node_events.Disconnected, life)
            return
        node.connection = next(self._connections)
        self._store.names[key] = node.name
        self._tell_server(partial(events.Joined, nodes={key: node.name}), server.life)
        if node.connection is not None:
            self._tell_node(key, node_events.Connected, life)

    def _trained(self, key: str, task: StartTraining, life: int) -> None:
        """Training gives the same bits for the same round and model; what was kept is not trained again."""
        node = self._nodes[key]
        if not node.up or node.life != life or node.state.task is not task:
            return
        if (task.round, task.attempt) not in node.outbox:
            if not self._server.up or self._world.happens(self.faults.broken):  # the model can't be fetched
                self._tell_node(key, partial(node_events.Unanswered, task=task), life)
                return
            assert task.counted in node.memories, "what goes with the node's last update that counted is gone"
            node.trained += 1
            update = made(Address(RUN, task.round, task.attempt, key), task.model, task.counted)
            node.outbox[task.round, task.attempt] = update
            node.memories = {task.counted, update}
            self.hostile.spoils(key, update)
        self._tell_node(key, partial(node_events.Trained, task=task, digest=node.outbox[task.round, task.attempt]), life)

    def _said_update(self, key: str, message: FlUpdate) -> None:
        address = Address(RUN, message.round, message.attempt, key)
        if verdict := self._server.verdicts.get((address, message.digest)):
            self._to_node(key, partial(node_events.Judged, verdict=verdict))

    def _take(self, key: str, end: EndSession, life: int) -> None:
        failed = not self._server.up or self._world.happens(self.faults.broken)
        self._tell_node(key, node_events.NotTaken if failed else node_events.Taken, life)
        del end

    def _leave(self, key: str, end: EndSession | None) -> None:
        node = self._nodes[key]
        node.ended, node.up = end, False
        if node.connection is not None and self._server.up:
            self._to_server(key, partial(self._tell_server, partial(events.Left, node=key), self._server.life))
            self._hangs_up(node, node.connection)

    # The control channel.

    def _to_node(self, key: str, event: Callable[[float], node_events.Event]) -> None:
        node = self._nodes[key]
        if node.connection is not None:
            self._send(node, partial(self._tell_node, key, event, node.life))

    def _to_server(self, key: str, act: Callable[[], None]) -> None:
        node = self._nodes[key]
        if node.connection is not None:
            self._send(node, act)

    def _send(self, node: _Node, deliver: Callable[[], None]) -> None:
        """A message over a connection: what is under way when it breaks is lost."""
        connection = node.connection
        assert connection is not None
        if self._world.happens(self.faults.breaks):
            self._hangs_up(node, connection)
            return

        def arrive() -> None:
            if node.connection == connection or not node.up:
                deliver()

        for _ in range(0 if self._world.happens(self.faults.lost) else 2 if self._world.happens(self.faults.doubled) else 1):
            self._after_delay(arrive)

    def _hangs_up(self, node: _Node, connection: int) -> None:
        """Both ends hear of it, each in its own time."""
        if node.connection != connection:
            return
        node.connection = None
        key, life = next(key for key, one in self._nodes.items() if one is node), self._server.life
        self._after_delay(partial(self._tell_node, key, node_events.Disconnected, node.life))
        self._after_delay(partial(self._lose, key, life))

    def _lose(self, key: str, life: int) -> None:
        if self._nodes[key].connection is None:  # else it is back, and the server has heard of that first
            self._tell_server(partial(events.Lost, node=key), life)
