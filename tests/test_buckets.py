"""Secure sums in buckets under a robust rule: deployed and simulated, with hostile nodes and lost ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run
from tests.server.test_retention import replayed

from atoll import algorithms, learners, method
from atoll.errors import PlanError
from atoll.learner import Data, Rows
from atoll.node import events
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.privacy.dp.account import account
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.simulate.attacks import hostile, sign_flip
from atoll.store.sql import SqlStore

BUCKETS = {"secure_aggregation": True, "buckets": 4}
TWELVE = {"minimum": 12}
MEDIAN = plan(privacy=BUCKETS, aggregation={"rule": "median"}, cohort=TWELVE)


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_a_deployed_run_has_the_bits_of_a_simulated_one_and_is_replayed(tmp_path, log, request):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = MEDIAN.with_(log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    deployed, simulated = run(agreed, clients(12), tmp_path), simulate(agreed, clients(12))
    models = [row["model"] for row in deployed["rounds"]]
    assert models == [row["model"] for row in simulated.rounds], "not the same bits"
    assert replayed(tmp_path / "store", deployed["run"]) == models
    assert deployed["rounds"][0]["nodes"] == simulated.rounds[1]["nodes"], "not the same figures"
    assert not any(row["by_node"] for row in deployed["rounds"]), "figures of single nodes are known"


@pytest.mark.parametrize("options", [{"rule": "median"}, {"rule": "trimmed_mean"}, {"rule": "geometric_median"}])
def test_a_hostile_node_of_twelve_ruins_one_sum_and_not_the_model(options):
    """Judged at a node that isn't hostile. The same attack on one sum of all is what the buckets are for."""
    attack = hostile(["node-3"], sign_flip(scale=50.0))

    def loss(agreed, **tampered):
        return simulate(agreed, clients(12), **tampered).by_node["node-0"]["loss"]

    clean = loss(plan(cohort=TWELVE))
    assert loss(plan(privacy={"secure_aggregation": True}, cohort=TWELVE), tamper=attack) > 10 * clean
    assert loss(MEDIAN.with_(aggregation=options), tamper=attack) < 1.2 * clean


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"aggregation": {"rule": "fedavg"}}, "leave buckets out, or take a robust rule, such as median"),
        ({"aggregation": {"rule": "one_shot"}}, "'one_shot' looks at single updates, and privacy.secure_aggregation hides them"),
        ({"aggregation": {"rule": "krum"}}, r"'krum' with these options compares at least 5; it is 4; raise it \(and cohort.min"),
        ({"aggregation": {"rule": "bulyan"}}, "compares at least 7"),
        ({"privacy": {"buckets": 2}}, "privacy.buckets"),
        ({"cohort": {"minimum": 11}}, "raise cohort.minimum to 12 or more, or lower buckets"),
        ({"privacy": {"secure_aggregation": False}}, "buckets is of secure sums: add secure_aggregation = true"),
        ({"privacy": {"secure_aggregation": False, "encryption": True}}, "take that in place of encryption"),
        ({"privacy": {"clip": 1.0, "central_noise": {"epsilon": 8.0, "delta": 1e-5}}}, "take distributed_noise"),
        ({"privacy": {"corrupt": 2}}, "lower privacy.dropout or privacy.corrupt"),
        ({"compression": {"up": ["randomk:0.5"]}}, "leave it out"),
        ({"privacy": {"buckets": None}}, "privacy.buckets = 3 or more, with secure_aggregation"),
        ({"privacy": {"buckets": None}, "aggregation": {"rule": "krum"}}, "privacy.buckets = 5 or more"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused_with_its_mend(changed, said):
    with pytest.raises(PlanError, match=said):
        simulate(MEDIAN.with_(**changed), clients(12))


class Silent(Node):
    """A node that falls silent in another phase of each round, and is asked again in the next one."""

    phases: ClassVar = {(1, 1): "shares", (2, 1): "update", (3, 1): "unmask"}

    async def _answer(self, command: events.Answer) -> None:
        if self.phases.get((command.task.round, command.task.attempt)) != command.phase:
            await super()._answer(command)

    async def _protect(self, command: events.Protect) -> None:
        if self.phases.get((command.task.round, command.task.attempt)) != "update":
            await super()._protect(command)


def silenced(agreed: Plan, count: int, place: Path) -> dict[str, Any]:
    """Run some nodes, of which the last is silent now and then; the history has what the status `said`."""
    said: dict[str, dict[str, Any]] = {}

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=place / "store", port=0, watch=lambda _: said.update(_out(server)))
        kinds = [*[Node] * (count - 1), Silent]
        named = zip(kinds, clients(count).items(), strict=True)
        nodes = [kind(server.url, data, name=name, directory=place / name) for kind, (name, data) in named]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    return {**asyncio.run(asyncio.wait_for(together(), 90)), "said": said}


def _out(server: Server) -> dict[str, dict[str, Any]]:
    """What the status says while nodes are out of the round, by what is waited for without the seconds that are left."""
    if not hasattr(server.drive, "state"):
        return {}
    found = server.status()
    out = {node["name"]: node["reason"] for node in found["nodes"] if node["doing"] == "declined"}
    return {f"{found['round']}: {found['waiting_for'].rpartition('; ')[0]}": out} if out else {}


def test_a_bucket_that_falls_below_its_minimum_is_left_out_and_the_round_goes_on(tmp_path):
    """In the last phase two of three are enough: the third's secrets are in shares."""
    history = silenced(MEDIAN.with_(cohort={"grace": 0.5, "quorum": 0.9}), 12, tmp_path)
    assert history["outcome"] == "completed", history["reason"]
    assert [len(row["answered"]) for row in history["rounds"]] == [9, 9, 12]
    assert [row["attempt"] for row in history["rounds"]] == [1, 1, 1], "a round was tried again for one bucket's sake"
    assert "node-11" not in [name for row in history["rounds"][:2] for name in row["answered"]]
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
    left_out = [one for one in SqlStore(tmp_path / "store").updates(history["run"]) if one.status != "accepted"]
    assert [(one.round, one.status) for one in left_out] == [*[(1, "declined")] * 3, *[(2, "rejected")] * 2]
    why = "only 2 of 3 nodes gave shares: it takes 3", "only 2 of 3 nodes sent an update: it takes 3"
    assert {(one.round, one.reason.partition(" was left out: ")[2]) for one in left_out} == {(1, why[0]), (2, why[1])}
    for round_, reason in enumerate(why, 1):
        said = [(line, out) for line, out in history["said"].items() if line.startswith(f"{round_}: ") and reason in line]
        assert said, "the status doesn't say that a bucket was left out"
        assert all(len(out) == 3 and reason in out["node-11"] for _, out in said)


def test_with_fewer_buckets_than_the_rule_takes_a_try_is_given_up(tmp_path):
    """Of three buckets one is lost, and the median of two is none."""
    three = {"plan": {"rounds": 1}, "privacy": {"buckets": 3}, "cohort": {"minimum": 9, "grace": 0.5, "deadline": 6}}
    history = silenced(MEDIAN.with_(**three), 9, tmp_path)
    assert [(row["attempt"], len(row["answered"])) for row in history["rounds"]] == [(2, 9)]


NOISY = {"clip": 1.0, "distributed_noise": {"multiplier": 2.0, "delta": 1e-5}, "corrupt": 1}


def test_each_buckets_sum_has_all_of_the_noise_and_a_round_costs_the_epsilon_of_one():
    """A bucket of three has what two nodes add: an unrelated federation of three has the very same shares and the same ε."""
    quiet = {"training": {"learning_rate": 1e-9, "epochs": 1, "batch_size": 40}, "plan": {"rounds": 2}}
    small = plan(**quiet, privacy={"secure_aggregation": True, **NOISY}, aggregation={"options": {"weighted": False}})
    split = MEDIAN.with_(**quiet, privacy=NOISY)
    learner = learners.build(split)
    assert account(split) == account(small)
    one, other = (simulate(agreed, clients(count)) for agreed, count in ((small, 3), (split, 12)))
    assert [row["epsilon"] for row in other.rounds] == [row["epsilon"] for row in one.rounds]
    assert [row["noise"] for row in other.rounds] == [{"multiplier": 2.0}] * 2

    algorithm, data = method.find(split, learner), Data(Rows(*rows(1)), Rows(*rows(2)))
    sent = [algorithms.work(split, algorithm, learner, learner.initial(1), {}, data, 1, "node")[1] for _ in range(400)]
    spread = np.concatenate([one.groups["parameters"].values for one in sent]).std()
    assert spread == pytest.approx(2.0 / np.sqrt(3 - 1), rel=0.1), "three nodes, of whom one may add none"


def test_a_simulation_leaves_the_same_buckets_out_and_goes_on_with_them(tmp_path):
    """A node that has more rows than the plan lets count declines each time, when its bucket is drawn already."""
    agreed = MEDIAN.with_(plan={"rounds": 2}, privacy={"largest_weight": 50}, cohort={"grace": 0.5, "quorum": 0.9})
    data = {**clients(12), "node-5": rows(5, 60)}
    refused: list[str] = []

    def watch(event: Any) -> None:
        if event["what"] == "rejected":
            refused.append(event["reason"])
        if (event["what"], event.get("round")) == ("round", 2):
            raise KeyboardInterrupt

    whole, deployed = simulate(agreed, data), run(agreed, data, tmp_path)
    assert [row["answered"] for row in deployed["rounds"]] == [row["answered"] for row in whole.rounds]
    assert [len(row["answered"]) for row in whole.rounds] == [9, 9]
    assert [row["model"] for row in deployed["rounds"]] == [row["model"] for row in whole.rounds]
    with pytest.raises(KeyboardInterrupt):
        simulate(agreed, data, store=tmp_path / "simulated", watch=watch)
    assert [reason.partition(" was left out: ")[2] for reason in refused] == ["only 2 of 3 nodes sent an update: it takes 3"] * 2
    assert simulate(agreed, data, store=tmp_path / "simulated", resume=True).rounds == whole.rounds
