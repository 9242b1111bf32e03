"""A simulated run: the server's own machine and `close`, over clients in memory and a strategy to train them by."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from atoll import algorithms, compression, learners, method
from atoll.algorithms import State
from atoll.algorithms.drift import Drift, drift, told
from atoll.compression import parted
from atoll.errors import AtollError, GaveUpError, PrivacyError
from atoll.keys import new_secret
from atoll.learner import Learner, Rows, named, pooled, summary
from atoll.metrics import spread
from atoll.plan import Plan
from atoll.privacy import choose as privacy
from atoll.privacy.dp.account import Account, account
from atoll.server import events, machine
from atoll.server.close import expanded, step
from atoll.server.state import State as Machine
from atoll.simulate import choose
from atoll.simulate.attacks import Tamper
from atoll.simulate.checkpoint import Checkpoint, Kept, trained_by
from atoll.simulate.clients import ready
from atoll.simulate.clock import Clock
from atoll.simulate.cohort import Cohort, There
from atoll.simulate.devices import Devices
from atoll.simulate.linked import Linked
from atoll.simulate.map import Strategy, Work
from atoll.vector import Groups, Update

Watch = Callable[[Mapping[str, Any]], None]
Made = Callable[[Work], Strategy]
"""What makes a strategy of one's own."""
_ASKED_AT_THE_END = 10_000
"""Of more clients than this, none is judged by the final model."""


@dataclass(frozen=True)
class Simulated:
    """What a simulated run gives.

    Args:
        rounds: a mapping for each round: `round`, `answered`, `late` (by how many rounds), `model`, `holdout` and `nodes`
            (figures), `bytes`, `drift` (norm and cosine of each client's update), `dissimilarity` and `spread`.
        model: the final model's groups.
        digest: the SHA-256 of its file.
        holdout: how the final model does on the holdout, as figures; empty without one.
        by_node: how it does on each client's own rows; empty beyond 10,000 clients.
        reason: why the run ended: all rounds are done, or it stopped early.
        strategy: how clients were trained: `map`, `scan`, `vmap` or `pool`.
        said: what is to be known of that, such as why another one was not taken; mostly empty.
        state: what a server is left with: the model, and what the method has beside it, such as an ensemble.
    """

    rounds: list[dict[str, Any]]
    model: Groups
    digest: str
    holdout: dict[str, float]
    by_node: dict[str, dict[str, float]]
    reason: str = ""
    strategy: str = "map"
    said: str = ""
    state: Groups = field(default_factory=dict)


@dataclass
class _Run:
    """A simulated federation in mid-run: the server's part of it."""

    work: Work
    cohort: Cohort
    holdout: Rows | None
    watch: Watch
    state: State
    judge_every: int = 1
    account: Account | None = None
    noises: list[method.Made] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    kept: Checkpoint | None = None

    def train(self, command: events.Train) -> list[events.Event]:
        """Let the asked clients train."""
        return self.cohort.train(command, judged=self.due(command.round))

    def begin(self) -> None:
        """Send the first model; the state is made anew of what clients make of it, where that is another one."""
        self.cohort.strategy.ready(self.holdout)
        self.cohort.publish(self.work.algorithm.brief(self.state))
        if self.cohort.down.small:
            self.state = self.work.algorithm.init(self.groups())

    def due(self, round_: int) -> bool:
        """Say whether models are judged in a round."""
        return round_ % self.judge_every == 0 or round_ == self.work.plan.plan.rounds

    def close(self, command: events.Close) -> list[events.Event]:
        """Fold what came into the next model, and tell how it does."""
        cohort, due = self.cohort, self.due(command.round)
        came = {name: cohort.updates.pop(name) for name in command.accepted}
        try:
            noise, seen = self.fold(command, came)
        except PrivacyError as error:  # too few gave what unmasking takes
            return [events.Abandoned(cohort.clock.now, str(error))]
        lost = cohort.linked.lost if cohort.linked else {}
        accepted = {name: update for name, update in came.items() if name not in lost}
        cohort.publish(self.work.algorithm.brief(self.state), command.round)
        facts: dict[str, Any] = {
            "round": command.round,
            "answered": list(accepted),
            "model": cohort.model,
            "late": _late(command),
            "bytes": sum(cohort.sizes[name] for name in accepted),
            "fetched": cohort.fetched,
            **self.at_clients({name: one for name, one in accepted.items() if name not in command.late}, due=due),
            **told(seen, {name: cohort.norms.get(name) for name in accepted}),
            "holdout": self.judge(self.holdout) if self.holdout and due else {},
        }
        if self.account:
            facts["noise"] = noise and {key: noise[key] for key in ("multiplier", "tries") if key in noise}
            if due:
                facts["epsilon"] = method.spent(self.account, [*self.noises, noise])
        cohort.fetched = 0
        if cohort.clock.devices:
            facts["at"] = round(cohort.clock.now, 3)
        self.noises.append(noise)
        self.rounds.append(facts)
        self.watch({"what": "round", **facts})
        over = method.over(self.account, self.noises)
        judged = events.Closed(cohort.clock.now, cohort.model, facts["holdout"] or facts["nodes"], over, lost)
        more = cohort.there and command.round < self.work.plan.plan.rounds
        return [*(cohort.presence(command.round + 1) if more else ()), judged]

    def fold(self, command: events.Close, accepted: Mapping[str, Update]) -> tuple[method.Made, Drift | None]:
        """Fold updates into the next state; return the noise in it, and how they differed where that can be seen."""
        cohort, linked, late = self.cohort, self.cohort.linked, _late(command)
        layouts = self.work.algorithm.updates(self.work.learner.layouts)
        guard = expanded(linked.guard(), cohort.press, layouts, command.round) if linked else None
        layouts = guard.layouts if guard else layouts
        own = algorithms.reference(*self.work, self.state, self.holdout, command.round)
        here = method.Round(command.round, command.attempt, command.cohort, len(cohort.clients), len(accepted))
        noise = method.noise(self.work.plan, self.account, here, self.noises)
        undo = method.noised(self.work.plan, layouts, noise)
        seen: list[Drift | None] = []
        see = None if guard or undo or not self.due(command.round) else (lambda *them: seen.append(drift(*them)))
        whole = self.work.algorithm, self.state, layouts, accepted, len(cohort.clients)
        after = step(*whole, own, late, guard, undo=undo, see=see)
        if taught := algorithms.taught(*self.work, self.state, after, self.holdout, command.round):
            after = step(*whole, taught, late, guard, undo=undo)
        self.state = after
        return noise, seen[0] if seen else None

    def at_clients(self, updates: Mapping[str, Update], *, due: bool) -> dict[str, Any]:
        """How the model that clients were sent does at them: over all, and from one to another where no guard hides that."""
        linked, sums = self.cohort.linked, [one.metrics for one in updates.values()]
        if linked:
            sums = [named(linked.metrics, sums)]
        apart = {name: summary(one.metrics) for name, one in updates.items()} if due and not linked else None
        return {"nodes": summary(pooled(sums)) if due else {}, "spread": spread(apart) if apart is not None else {}}

    def judge_update(self, command: events.Judge) -> list[events.Event]:
        """Let a client know that its update counts; tell who watches of one that is refused."""
        name = command.address.node
        if command.accepted:
            self.cohort.settle(name)
        else:
            self.watch({"what": "rejected", "round": command.address.round, "name": name, "reason": command.reason})
        return []

    def end(self, command: events.End) -> list[events.Event]:
        """Let the clients go."""
        return [events.Left(self.cohort.clock.now, name) for name in command.nodes]

    def finish(self, command: events.Finish) -> list[events.Event]:
        """Keep why it ended; raise where that was not at its end."""
        if command.outcome != "completed":
            raise GaveUpError(command.reason)
        self.reason = command.reason
        return []

    def wake(self, command: events.Wake) -> list[events.Event]:
        """Let the machine look at its deadlines, where time passes."""
        self.cohort.clock.wake(command.at)
        return []

    def keep(self, server: Machine, closed: events.Closed) -> None:
        """Keep the run as it is when a round is folded, where it is to be kept."""
        if not self.kept:
            return
        cohort, opened = self.cohort, self.cohort.open(server)
        memories = {name: memory for name in server.closing if (memory := cohort.drafts[name])}
        briefs = {task.model: cohort.briefs[task.model] for name, task in server.tasks.items() if name not in server.closing}
        coming = cohort.clock.coming
        self.kept.save(Kept(server, closed, self.state, self.rounds, memories, opened, briefs, coming, cohort.given))

    def kept_in(self, store: str | Path | None, *, resume: bool) -> Kept | None:
        """Keep the run in a folder, and go on with the one that is there where that is asked for.

        Raises:
            AtollError: there is none, or another one, or a run of this plan can't be kept.
        """
        if store is None:
            if resume:
                raise AtollError("--resume: name the folder of the run that goes on, --store")
            return None
        plan, cohort = self.work.plan, self.cohort
        if plan.privacy.tree_noise:
            raise AtollError("--store: a folder must not hold the key of tree_noise; leave --store out, or run it in one go")
        devices = cohort.clock.devices.digest if cohort.clock.devices else "none"
        told = {"clients": len(cohort.clients), "strategy": cohort.strategy.name, "devices": devices}
        self.kept = Checkpoint(Path(store), plan, told)
        if not resume:
            self.kept.begin()
            return None
        found = self.kept.find(cohort.clients)
        self.state, self.rounds = found.state, found.rounds
        self.noises = [one.get("noise") for one in found.rounds]
        cohort.publish(found.given.model if found.given else self.work.algorithm.brief(self.state))
        if found.given:
            _, cohort.had, cohort.step = found.given
        cohort.briefs = dict(found.briefs)
        cohort.clock.go_on(found.coming)
        cohort.go_on(found.server, found.memories, found.open)
        return found

    def groups(self) -> Groups:
        """Return the present model's own groups."""
        return {name: self.cohort.brief[name] for name in self.work.learner.layouts}

    def judge(self, rows: Rows) -> dict[str, float]:
        """How the present model does on some rows, as figures."""
        return summary(self.cohort.strategy.judge(self.groups(), [rows])[0])

    def judge_own(self, name: str) -> dict[str, float]:
        """How the model that a client itself uses does on its rows, as figures."""
        (memory, _), data = parted(self.cohort.memories.get(name)), self.cohort.clients[name]
        mine = algorithms.own(*self.work, self.cohort.brief, memory, data, self.work.plan.plan.rounds, name)
        return summary(self.work.learner.evaluate(mine, data.judge))

    def judge_each(self) -> dict[str, dict[str, float]]:
        """How the present model does on each client's rows, as figures."""
        clients = self.cohort.clients
        if len(clients) > _ASKED_AT_THE_END:
            return {}
        if self.work.algorithm.own is not None:
            return {name: self.judge_own(name) for name in clients}
        judged = self.cohort.strategy.judge(self.groups(), [data.judge for data in clients.values()])
        return {name: summary(sums) for name, sums in zip(clients, judged, strict=True)}


def _late(command: events.Close) -> dict[str, int]:
    """By how many rounds updates are late."""
    return {name: command.round - task.round for name, task in command.late.items()}


def simulate(  # noqa: PLR0913  all but two have defaults
    plan: Plan,
    clients: Mapping[str, Any],
    *,
    holdout: Rows | None = None,
    learner: Learner | None = None,
    allow: Collection[str] = (),
    watch: Watch | None = None,
    start: learners.Start | None = None,
    tamper: Tamper | None = None,
    strategy: str | Made = "map",
    workers: int | None = None,
    backend: str | None = None,
    judge_every: int = 1,
    there: There | None = None,
    devices: Devices | str | Path | None = None,
    store: str | Path | None = None,
    resume: bool = False,
) -> Simulated:
    """Run a plan over clients in this process, on the machine and the `close` that a server runs.

    Args:
        plan: the plan; its cohort's minimum can't exceed the number of clients.
        clients: name → its data: a CSV file, arrays `(x, y)`, `(x, y, x_test, y_test)`, or `Data`; or a
            `Spread`, whose clients take no memory until they are asked.
        holdout: rows to judge each round's model by.
        learner: the plan's learner, where one is built already.
        allow: functions ("package.module:function") that the plan may name here, beside those of installed packages.
        watch: told of each round, and of each update that is refused.
        start: a model to begin with, a `.safetensors` or `.keras` file or groups; else a new one by the plan's seed.
        tamper: makes of a round's updates what clients send: hostile ones, see `atoll.simulate.attacks`.
        strategy: how clients are trained: `map`, one after the other; `scan` or `vmap`, compiled together; `pool`, in
            processes; or `auto`, the fastest of these by a measurement in the first round; or a function that makes one
            of your own.
        workers: threads, or processes of a pool; as many as there are processors unless named. The result is the same
            for any number.
        backend: "ray": in processes of a Ray cluster, one of this machine, or with "ray:HOST:PORT" one that runs; the result
            is that of the same strategy without.
        judge_every: models are judged every so many rounds, and after the last one.
        store: a folder that keeps the run after each round, so that one that was stopped can go on.
        resume: go on with the run there, to the bits of one that was never stopped.
        there: round → the names of the clients that can be asked in it; all of them unless given.
        devices: what clients run on, or a file that says it: the run is in virtual time then, and each round has `at`, when it
            closed, in seconds.

    Returns:
        The rounds, and the final model. Under strategy `map` it is equal, bit for bit, to that of a deployed run whose
        nodes have these names; under others within 1e-5.

    Raises:
        AtollError: the plan or the data can't be used, or a client's training diverged (NaN): round and client are named.
        GaveUpError: too few clients, or they can't train.
    """
    built = learner or learners.build(plan, allow)
    work = Work(plan, method.find(plan, built), built)
    updates = work.algorithm.updates(built.layouts)
    press = compression.find(plan, updates, sums=algorithms.adds(work.algorithm))
    algorithms.rooted(plan, work.algorithm, holdout)
    spending = account(plan)
    data = ready(plan, clients)
    if judge_every > 1 and plan.stopping.patience:
        raise AtollError("stopping.patience counts rounds that are judged: judge every round, or leave it out of the plan")
    state = work.algorithm.init(learners.first(plan, built, start))
    watch = watch or (lambda _: None)
    clock = Clock(Devices.load(Path(devices), plan.plan.seed) if isinstance(devices, str | Path) else devices)
    if there and clock.devices and clock.devices.come_and_go:
        raise AtollError("--available: these devices come and go by themselves (online and offline, or a trace): leave one out")
    with contextlib.ExitStack() as opened:
        hands = choose.Hands(workers, None if learner else allow)
        if backend:
            cluster = choose.cluster(backend, work, hands)
            opened.callback(cluster.close)
            hands = hands._replace(cluster=cluster)
        if strategy == "auto" and resume and store:
            strategy = trained_by(Path(store)) or strategy
        named = strategy if isinstance(strategy, str) else ""
        make = choose.named(named, work.algorithm.brief(state), data, hands, watch) if named else cast("Made", strategy)
        chosen = make(work)
        opened.callback(chosen.close)
        privacy.prepare(plan)
        link, layouts = privacy.protected(plan, updates, press.layouts(updates), work.algorithm.least)
        linked = Linked(link, plan, work.algorithm, layouts) if link else None
        cohort = Cohort(work, press, compression.down(plan, built.layouts), data, chosen, clock, tamper, there, linked)
        opened.callback(cohort.close)
        run = _Run(work, cohort, holdout, watch, state, judge_every, spending)
        run.begin()
        return _driven(run, run.kept_in(store, resume=resume))


def _driven(run: _Run, kept: Kept | None) -> Simulated:
    """Let the machine go through all rounds, or through those that are left."""
    work, cohort = run.work, run.cohort
    acts: Mapping[type[events.Command], Callable[[Any], list[events.Event]]] = {
        events.Train: run.train,
        events.Close: run.close,
        events.End: run.end,
        events.Finish: run.finish,
        events.Judge: run.judge_update,
        events.Say: cohort.say,
        events.Collect: cohort.collect,
        events.Wake: run.wake,
    }
    steps, secret = cohort.linked.steps if cohort.linked else events.NO_STEPS, new_secret()
    waiting: deque[events.Event] = deque([kept.closed] if kept else cohort.presence(1))
    if kept:
        server = replace(kept.server, secret=secret)
    else:
        late = work.algorithm.late is not None
        server, commands = machine.begin("simulated", work.plan, cohort.model, 0.0, late=late, secret=secret, steps=steps)
        for command in commands:
            waiting.extend(acts[type(command)](command))
    while waiting or (cohort.clock and not run.reason):
        event = waiting.popleft() if waiting else cohort.clock.next()
        if isinstance(event, events.Closed) and event is not (kept and kept.closed):
            run.keep(server, event)
        server, commands = machine.transition(server, event)
        if isinstance(event, events.Closed):
            cohort.forget(server)
        for command in commands:
            waiting.extend(acts[type(command)](command))
    judged = run.rounds[-1]["holdout"] if run.holdout else {}
    how_trained = cohort.strategy.name, cohort.strategy.said
    return Simulated(run.rounds, run.groups(), cohort.model, judged, run.judge_each(), run.reason, *how_trained, run.state)
