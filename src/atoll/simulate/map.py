"""Strategy `map`: clients train one after the other, in this process; bit for bit what a deployed run computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from atoll import algorithms, learners
from atoll.algorithms import Algorithm, Memory, State
from atoll.errors import AtollError, GaveUpError, LayoutError
from atoll.learner import Data, Learner, Rows, pooled, summary
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.server import events, machine
from atoll.server.close import Accepted, close
from atoll.simulate.attacks import Tamper
from atoll.vector import Groups, Metrics, Update, check
from atoll.wire import Address, digest_of, encode, pack

Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Simulated:
    """What a simulated run gives.

    Args:
        rounds: a mapping for each round: `round`, `answered`, `model`, `holdout` and `nodes` (figures), `bytes`.
        model: the final model's groups.
        digest: the SHA-256 of its file.
        holdout: how the final model does on the holdout, as figures; empty without one.
        by_node: how it does on each client's own rows.
        reason: why the run ended: all rounds are done, or it stopped early.
    """

    rounds: list[dict[str, Any]]
    model: Groups
    digest: str
    holdout: dict[str, float]
    by_node: dict[str, dict[str, float]]
    reason: str = ""


@dataclass
class _Run:
    """A simulated federation in mid-run: the clock stands still, and every client answers at once."""

    plan: Plan
    learner: Learner
    algorithm: Algorithm
    clients: Mapping[str, Data]
    holdout: Rows | None
    watch: Watch
    state: State
    tamper: Tamper | None = None
    model: str = ""
    memories: dict[str, Memory] = field(default_factory=dict)
    drafts: dict[str, Memory] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    def train(self, command: events.Train) -> list[events.Event]:
        """Let the asked clients train, one by one."""
        self.bodies, self.metrics = {}, {}
        brief = self.algorithm.brief(self.state)
        happened: list[events.Event] = []
        updates: dict[str, Update] = {}
        for name in command.nodes:
            address = Address("simulated", command.round, command.attempt, name)
            try:
                memory, update = algorithms.work(
                    self.plan, self.algorithm, self.learner, brief, self.memories.get(name, {}), self.clients[name],
                    command.round, name,
                )  # fmt: skip
            except AtollError as error:
                happened.append(events.Declined(0.0, address, str(error)))
                continue
            self.drafts[name] = memory
            self.metrics[name] = update.metrics
            if self.tamper:
                updates[name] = update
            else:
                happened.append(self.arrive(address, update))
        if self.tamper and updates:
            for name, update in self.tamper(command.round, updates).items():
                happened.append(self.arrive(Address("simulated", command.round, command.attempt, name), update))
        return happened

    def arrive(self, address: Address, update: Update) -> events.Event:
        """Take an update in, and check it as a server does."""
        body = self.bodies[address.node] = b"".join(encode(update, self.model))
        what = address, address.node, len(body)
        try:
            return events.Appended(0.0, *what, check(update.groups, self.algorithm.updates(self.learner.layouts)))
        except LayoutError as error:
            return events.Refused(0.0, *what, str(error))

    def close(self, command: events.Close) -> list[events.Event]:
        """Fold what came into the next model."""
        accepted = [Accepted(name, lambda name=name: self.bodies[name]) for name in command.accepted]  # type: ignore[misc]
        layouts, registered = self.learner.layouts, len(self.clients)
        own = algorithms.reference(self.plan, self.algorithm, self.learner, self.state, self.holdout, command.round)
        self.state = close(self.algorithm, self.state, layouts, self.model, accepted, registered, own)
        self.model = digest_of(pack(self.algorithm.brief(self.state)))
        facts: dict[str, Any] = {
            "round": command.round,
            "answered": list(command.accepted),
            "model": self.model,
            "bytes": sum(len(self.bodies[name]) for name in command.accepted),
            "nodes": summary(pooled(self.metrics[name] for name in command.accepted)),
            "holdout": self.judge(self.holdout) if self.holdout else {},
        }
        self.rounds.append(facts)
        self.watch({"what": "round", **facts})
        return [events.Closed(0.0, self.model, facts["holdout"] or facts["nodes"])]

    def judge_update(self, command: events.Judge) -> list[events.Event]:
        """Let a client remember what goes with its update, now that it counts; tell who watches of one that is refused."""
        name = command.address.node
        if command.accepted:
            self.memories[name] = self.drafts.pop(name)
        else:
            self.watch({"what": "rejected", "round": command.address.round, "name": name, "reason": command.reason})
        return []

    def end(self, command: events.End) -> list[events.Event]:
        """Let the clients go."""
        return [events.Left(0.0, name) for name in command.nodes]

    def finish(self, command: events.Finish) -> list[events.Event]:
        """Keep why it ended; raise where that was not at its end."""
        if command.outcome != "completed":
            raise GaveUpError(command.reason)
        self.reason = command.reason
        return []

    def nothing(self, command: events.Command) -> list[events.Event]:
        """Do nothing."""
        del command
        return []

    def judge(self, rows: Rows) -> dict[str, float]:
        """How the present model does on some rows, as figures."""
        brief = self.algorithm.brief(self.state)
        return summary(self.learner.evaluate({name: brief[name] for name in self.learner.layouts}, rows))

    def judge_own(self, name: str) -> dict[str, float]:
        """How the model that a client itself uses does on its rows, as figures."""
        brief, memory, data = self.algorithm.brief(self.state), self.memories.get(name, {}), self.clients[name]
        about = (self.plan, self.algorithm, self.learner, brief, memory, data, self.plan.plan.rounds, name)
        return summary(self.learner.evaluate(algorithms.own(*about), data.judge))


_ACTS: Mapping[type[events.Command], Callable[[_Run, Any], list[events.Event]]] = {
    events.Train: _Run.train,
    events.Close: _Run.close,
    events.End: _Run.end,
    events.Finish: _Run.finish,
    events.Judge: _Run.judge_update,
    events.Wake: _Run.nothing,  # time stands still
}


def simulate(
    plan: Plan,
    clients: Mapping[str, Any],
    *,
    holdout: Rows | None = None,
    learner: Learner | None = None,
    allow: Collection[str] = (),
    watch: Watch | None = None,
    start: learners.Start | None = None,
    tamper: Tamper | None = None,
) -> Simulated:
    """Run a plan over clients in this process, on the machine and the `close` that a server runs.

    Args:
        plan: the plan; its cohort's minimum can't exceed the number of clients.
        clients: name → its data: a CSV file, arrays `(x, y)`, `(x, y, x_test, y_test)`, or `Data`.
        holdout: rows to judge each round's model by.
        learner: the plan's learner, where one is built already.
        allow: functions ("package.module:function") that the plan may name here, beside those of installed packages.
        watch: told of each round, and of each update that is refused.
        start: a model to begin with, a `.safetensors` or `.keras` file or groups; else a new one by the plan's seed.
        tamper: makes of a round's updates what clients send: hostile ones, see `atoll.simulate.attacks`.

    Returns:
        The rounds, and the final model: equal, bit for bit, to that of a deployed run whose nodes have these names.

    Raises:
        AtollError: the plan or the data can't be used.
        GaveUpError: too few clients, or they can't train.
    """
    learner = learner or learners.build(plan, allow)
    algorithm = algorithms.find(plan, learner)
    algorithms.rooted(plan, algorithm, holdout)
    data = {name: source if isinstance(source, Data) else prepare(source, plan) for name, source in clients.items()}
    if len(data) < plan.cohort.minimum:
        raise GaveUpError(f"{len(data)} clients: the plan's cohort.minimum is {plan.cohort.minimum}")
    state = algorithm.init(learners.first(plan, learner, start))
    run = _Run(plan, learner, algorithm, data, holdout, watch or (lambda _: None), state, tamper)
    run.model = digest_of(pack(algorithm.brief(state)))
    server, commands = machine.begin("simulated", plan, run.model, 0.0)
    waiting: deque[events.Event] = deque([events.Joined(0.0, {name: name for name in data})])
    while waiting:
        server, commands = machine.transition(server, waiting.popleft())
        for command in commands:
            waiting.extend(_ACTS[type(command)](run, command))
    brief = algorithm.brief(run.state)
    by_node = {name: run.judge_own(name) for name in data}
    model = {name: brief[name] for name in learner.layouts}
    return Simulated(run.rounds, model, run.model, run.judge(holdout) if holdout else {}, by_node, run.reason)
