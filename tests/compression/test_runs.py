"""Compressed runs whole: deployed over both logs and simulated to the same bits, replayed, resumed, or refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.test_commands import atoll as command
from tests.faults.test_bad_input import Rogue
from tests.faults.test_recovery import killed
from tests.federation import clients, plan, run

from atoll import simulate
from atoll.algorithms.fedavg import fedavg
from atoll.compression import Press, stages
from atoll.errors import PlanError, UnwritableError
from atoll.learner import Rows
from atoll.learners.logistic import Logistic
from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server import quarantine
from atoll.server.close import Accepted, close
from atoll.server.replay import replay
from atoll.server.runtime import Server
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.vector import Group, Layout, Tensor, Update, layouts_of
from atoll.wire import Address, Envelope, decode, encode, unpack

UPS = [["bfloat16"], ["8bit"], ["rotate", "4bit"], ["topk:0.3", "8bit"], ["randomk:0.5"], ["powersgd:1", "bfloat16"]]
FUNCTION = "atoll.learners.networks:perceptron"
MODEL: dict[str, Any] = {"inputs": 30}
LAYERS: dict[str, Any] = {
    **MODEL, "logistic": False, "jax": FUNCTION, "options": {"sizes": [30, 6, 1]}, "loss": "sigmoid_binary_cross_entropy",
}  # fmt: skip
"""A model with a matrix of 30 × 6: of rank 1 it is 36 numbers long."""


def model_for(up: list[str]) -> dict[str, Any]:
    return LAYERS if up[0].startswith("powersgd") else MODEL


def pressed(up: list[str], **sections: Any) -> Plan:
    return plan(compression={"up": up}, **sections)


@pytest.fixture
def wide() -> dict[str, Any]:
    return {f"node-{k}": wider(k) for k in range(3)}


def wider(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(count, 30))
    return x, (x[:, :5].sum(axis=1) > 0).astype(float)


def models(history: dict[str, Any]) -> list[str]:
    return [one["model"] for one in history["rounds"]]


def replayed(place: Path) -> list[str]:
    async def go() -> list[str]:
        store = SqlStore(place / "store")
        try:
            return [one.found async for one in replay(place / "store", store, store.runs()[0], allow=[FUNCTION])]
        finally:
            store.close()

    return asyncio.run(go())


@pytest.mark.parametrize("up", UPS, ids="+".join)
def test_deployed_simulated_and_replayed_runs_have_the_same_bits(tmp_path, wide, up):
    agreed = pressed(up, model=model_for(up), plan={"rounds": 4})
    deployed = run(agreed, wide, tmp_path, allow=[FUNCTION])
    plain = simulate(agreed.with_(compression={"up": []}), wide, allow=[FUNCTION])
    simulated = simulate(agreed, wide, allow=[FUNCTION])
    assert models(deployed) == [one["model"] for one in simulated.rounds] == replayed(tmp_path)
    assert [one["bytes"] for one in deployed["rounds"]] == [one["bytes"] for one in simulated.rounds]
    assert simulated.digest != plain.digest


STEPS = [["topk:0.3", "8bit"], ["randomk:0.5"], ["powersgd:1", "bfloat16"]]


@pytest.mark.parametrize("down", STEPS, ids="+".join)
def test_nodes_get_from_model_to_model_by_steps_and_all_runs_have_the_same_bits(tmp_path, wide, down):
    """Deployed, simulated and replayed; each node fetches the first model whole, and then steps, by the bytes on the wire."""
    agreed = plan(
        compression={"down": down, "up": ["8bit"]}, model=model_for(down), plan={"rounds": 4}, cohort={"quorum": 1.0},
        aggregation={"rule": "fedadam"},
    )  # fmt: skip
    holdout = Rows(*wider(9))
    deployed = run(agreed, wide, tmp_path, holdout=holdout, allow=[FUNCTION])
    simulated = simulate(agreed, wide, holdout=holdout, allow=[FUNCTION])
    assert models(deployed) == [one["model"] for one in simulated.rounds] == replayed(tmp_path)
    assert deployed["rounds"][-1]["holdout"] == pytest.approx(simulated.holdout)
    (final,) = {(tmp_path / name / "final.safetensors").read_bytes() for name in wide}
    assert unpack(final, layouts_of(simulated.model))[0] == simulated.model, "nodes keep what they used"
    assert final == (tmp_path / "store" / "models" / f"{deployed['last']}.safetensors").read_bytes(), "whole"
    fetched = [one["fetched"] for one in deployed["rounds"]]
    assert fetched == [one["fetched"] for one in simulated.rounds]
    step, whole = fetched[1], 3 * (tmp_path / "store" / "models" / f"{deployed['initial']}.safetensors").stat().st_size
    assert fetched == [whole, step, step, step]
    (last,) = (tmp_path / "store" / "models").glob("*.step")
    assert 3 * last.stat().st_size == step


def test_who_missed_a_step_or_lost_its_model_takes_the_whole_and_who_only_died_goes_on_by_steps(tmp_path, wide):
    """After round 1 a node dies, and comes back with what it had; after round 2 its model is gone; after 3 it is cut in half."""
    agreed = plan(compression={"down": ["topk:0.3"]}, model=MODEL, plan={"rounds": 5}, cohort={"quorum": 1.0, "deadline": 60})
    mine = tmp_path / "node-0"

    def lose() -> None:
        for one in (mine / "model").iterdir():
            one.unlink()

    def halve() -> None:
        (one,) = (mine / "model").iterdir()
        half = one.read_bytes()[: one.stat().st_size // 2]
        one.unlink()
        one.write_bytes(half)

    async def dying(url: str) -> None:
        for round_, harm in ((1, None), (2, lose), (3, halve), (None, None)):
            over = asyncio.Event()

            def watch(said: Any, round_: Any = round_, harm: Any = harm, over: asyncio.Event = over) -> None:
                if (said["what"], said.get("round")) == ("sent", round_):
                    if harm:
                        harm()  # before anybody asks for more
                    over.set()

            node = Node(url, wide["node-0"], name="node-0", directory=mine, watch=watch)
            taking, dead = asyncio.create_task(node.start_async()), asyncio.create_task(over.wait())
            await asyncio.wait([taking, dead], return_when=asyncio.FIRST_COMPLETED)
            dead.cancel()
            if round_:
                taking.cancel()  # no goodbye
            await asyncio.wait([taking])

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        others = [Node(server.url, wide[name], name=name, directory=tmp_path / name) for name in ("node-1", "node-2")]
        history, *_ = await asyncio.gather(server.serve_async(), dying(server.url), *(node.start_async() for node in others))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert models(history) == [one["model"] for one in simulate(agreed, wide).rounds]
    fetched = [one["fetched"] for one in history["rounds"]]
    whole = (tmp_path / "store" / "models" / f"{history['initial']}.safetensors").stat().st_size
    step = fetched[1] // 3
    assert fetched == [3 * whole, 3 * step, whole + 2 * step, whole + 3 * step, 3 * step], "half a model is no start for a step"


def test_where_only_some_are_asked_those_who_were_asked_before_follow(tmp_path, wide):
    agreed = plan(
        compression={"down": ["randomk:0.5"]}, model=MODEL, plan={"rounds": 6},
        cohort={"quorum": 1.0, "fraction": 0.6, "minimum": 2},
    )  # fmt: skip
    deployed, simulated = run(agreed, wide, tmp_path), simulate(agreed, wide)
    assert models(deployed) == replayed(tmp_path)
    whole = (tmp_path / "store" / "models" / f"{deployed['initial']}.safetensors").stat().st_size
    (step,) = {one.stat().st_size for one in (tmp_path / "store" / "models").glob("*.step")}
    for rounds in (deployed["rounds"], simulated.rounds):  # whom they ask is drawn otherwise
        asked = [set(), *(set(one["answered"]) for one in rounds)]
        follow = [len(now & before) for before, now in itertools.pairwise(asked)]
        assert 0 < sum(follow) < 10
        assert [one["fetched"] for one in rounds] == [many * step + (2 - many) * whole for many in follow]


def test_killed_and_resumed_a_server_goes_on_with_steps(tmp_path):
    """Also where the method keeps more than the model, and no round was closed yet."""
    agreed = plan(
        compression={"down": ["topk:0.5"]}, plan={"rounds": 4}, cohort={"quorum": 1.0, "deadline": 60},
        aggregation={"rule": "fedadam"},
    )  # fmt: skip
    history, nodes = killed(agreed, tmp_path, [("asked", 1), ("round", 1), ("listening", 1)])
    simulated = simulate(agreed, clients())
    assert models(history) == [one["model"] for one in simulated.rounds] == replayed(tmp_path)
    assert [node.trained for node in nodes] == [4, 4, 4]
    assert history["rounds"][-1]["fetched"] == simulated.rounds[-1]["fetched"] != simulated.rounds[0]["fetched"]


def test_a_disk_that_is_full_when_a_step_is_stored_is_waited_for(tmp_path, wide, monkeypatch):
    agreed = plan(compression={"down": ["topk:0.3"]}, model=MODEL, cohort={"quorum": 1.0}, aggregation={"rule": "fedadam"})
    put, failed = Models.put_step, []

    def full(self: Models, *step: Any) -> None:
        if len(failed) < 2:
            failed.append(step)
            raise UnwritableError("the step to a model can't be stored (No space left on device); free some space")
        put(self, *step)

    monkeypatch.setattr(Models, "put_step", full)
    assert models(run(agreed, wide, tmp_path)) == [one["model"] for one in simulate(agreed, wide).rounds] == replayed(tmp_path)
    assert len(failed) == 2


def test_a_simulation_that_was_stopped_goes_on_with_steps(tmp_path, wide):
    agreed = plan(
        compression={"down": ["topk:0.3"], "up": ["topk:0.3"]}, model=MODEL, plan={"rounds": 5},
        aggregation={"rule": "fedadam"}, cohort={"fraction": 0.6, "minimum": 2},
    )  # fmt: skip

    def stop(said: Any) -> None:
        if said["what"] == "round" and said["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(agreed, wide, store=tmp_path / "kept", watch=stop)
    again, whole = simulate(agreed, wide, store=tmp_path / "kept", resume=True), simulate(agreed, wide)
    assert (again.digest, again.rounds) == (whole.digest, whole.rounds)


@pytest.mark.parametrize("down", [["bfloat16"], ["8bit"], ["rotate", "4bit"]], ids="+".join)
def test_nodes_fetch_smaller_models_and_all_runs_have_the_same_bits(tmp_path, wide, down):
    agreed = plan(compression={"down": down, "up": ["topk:0.5"]}, model={"inputs": 30}, plan={"rounds": 4})
    start = {"parameters": Logistic(30, 0.5).initial(0)["parameters"].with_values(np.linspace(-1, 1, 31))}
    holdout = Rows(*wider(9))
    deployed = run(agreed, wide, tmp_path, start=start, holdout=holdout)
    simulated = simulate(agreed, wide, start=start, holdout=holdout)
    assert models(deployed) == [one["model"] for one in simulated.rounds] == replayed(tmp_path)
    assert deployed["rounds"][-1]["holdout"] == pytest.approx(simulated.holdout)
    (final,) = {(tmp_path / name / "final.safetensors").read_bytes() for name in wide}
    assert unpack(final, layouts_of(simulated.model))[0] == simulated.model, "nodes keep what they used"
    sent = (tmp_path / "store" / "models" / f"{deployed['last']}.safetensors").read_bytes()
    assert sum(np.prod(one["shape"]) for name, one in header(sent).items() if name.startswith("parameters/")) == (
        16 if down[-1] == "4bit" else 31
    )
    out = command("export", "--to", tmp_path / "out.safetensors", "--which", "last", "--store", tmp_path / "store")
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "out.safetensors").read_bytes() == final


def header(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    del found["__metadata__"]
    return found


def test_what_a_small_model_leaves_out_stays_in_the_servers_own(wide):
    """Steps far below a level of 4 bits still add up: error feedback at the server."""
    sections: dict[str, Any] = {"model": {"inputs": 30}, "plan": {"rounds": 60}, "training": {"learning_rate": 0.02}}
    start = {"parameters": Logistic(30, 0.5).initial(0)["parameters"].with_values(np.linspace(-3, 3, 31))}
    found, plain = (simulate(plan(compression={"down": down}, **sections), wide, start=start) for down in (["4bit"], []))
    first, exact = start["parameters"].values, plain.model["parameters"].values
    step = 3 / 7
    assert np.abs(exact - first).max() > 2 * step
    assert np.abs(np.diff([one["nodes"]["loss"] for one in plain.rounds])).max() < 0.2
    assert np.abs(found.model["parameters"].values - exact).max() < 2.5 * step
    assert found.rounds[-1]["nodes"]["loss"] < 0.5 * found.rounds[0]["nodes"]["loss"]


def test_a_server_that_is_stopped_goes_on_with_small_models(tmp_path, wide):
    agreed = plan(
        compression={"down": ["8bit"], "up": ["8bit"]}, model={"inputs": 30}, plan={"rounds": 5}, cohort={"quorum": 1.0}
    )

    async def stopped(at: int, *, resume: bool) -> dict[str, Any]:
        def watch(said: Any) -> None:
            if said["what"] == ("round" if at else "asked") and said["round"] == max(at, 1):
                server.stop()

        server = Server(agreed, store=tmp_path / "store", port=0, watch=watch, resume=resume)
        nodes = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in wide.items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    for at, resume in ((0, False), (2, True), (9, True)):
        history = asyncio.run(asyncio.wait_for(stopped(at, resume=resume), 60))
    assert history["outcome"] == "completed"
    assert models(history) == [one["model"] for one in simulate(agreed, wide).rounds] == replayed(tmp_path)


def test_a_simulation_that_was_stopped_goes_on_with_small_models(tmp_path, wide):
    agreed = plan(compression={"down": ["8bit"], "up": ["topk:0.3"]}, model={"inputs": 30}, plan={"rounds": 5})

    def stop(said: Any) -> None:
        if said["what"] == "round" and said["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(agreed, wide, store=tmp_path / "kept", watch=stop)
    assert simulate(agreed, wide, store=tmp_path / "kept", resume=True).digest == simulate(agreed, wide).digest


def test_over_kafka_a_compressed_run_has_the_bits_of_the_simulated_one(tmp_path, wide, kafka):
    agreed = plan(
        compression={"up": ["topk:0.3", "8bit"], "down": ["topk:0.3"]}, model=MODEL,
        log={"kafka": kafka, "prefix": f"{tmp_path.name}."}, cohort={"quorum": 1.0},
    )  # fmt: skip
    deployed, simulated = run(agreed, wide, tmp_path), simulate(agreed, wide)
    assert models(deployed) == [one["model"] for one in simulated.rounds] == replayed(tmp_path)
    assert [one["fetched"] for one in deployed["rounds"]] == [one["fetched"] for one in simulated.rounds]


@pytest.mark.parametrize("up", [["topk:0.2", "4bit"], ["powersgd:1"], ["randomk:0.3"]], ids="+".join)
def test_a_node_that_is_killed_remembers_what_it_left_out(tmp_path, wide, up):
    """Wherever it dies, after its update left or before it is judged, what goes with its last update that counted is there."""
    agreed = pressed(up, model=model_for(up), plan={"rounds": 5}, cohort={"quorum": 1.0, "deadline": 60})

    async def dying(url: str) -> None:
        for end in (("trained", 2), ("sent", 3), ("verdict", 4), None):
            died = asyncio.Event()

            def watch(said: Any, end: Any = end, died: asyncio.Event = died) -> None:
                if (said["what"], said.get("round")) == end:
                    died.set()

            node = Node(url, wide["node-0"], name="node-0", directory=tmp_path / "node-0", watch=watch, allow=[FUNCTION])
            taking, dead = asyncio.create_task(node.start_async()), asyncio.create_task(died.wait())
            await asyncio.wait([taking, dead], return_when=asyncio.FIRST_COMPLETED)
            dead.cancel()
            if end is not None:
                taking.cancel()  # no goodbye
            await asyncio.wait([taking])

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0, allow=[FUNCTION])
        others = [
            Node(server.url, wide[name], name=name, directory=tmp_path / name, allow=[FUNCTION]) for name in ("node-1", "node-2")
        ]
        history, *_ = await asyncio.gather(server.serve_async(), dying(server.url), *(node.start_async() for node in others))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert models(history) == [one["model"] for one in simulate(agreed, wide, allow=[FUNCTION]).rounds]


def test_methods_that_remember_keep_their_own_memory_apart(tmp_path, wide):
    agreed = pressed(["topk:0.5", "8bit"], model={"inputs": 30}, aggregation={"rule": "scaffold"})
    deployed = run(agreed, wide, tmp_path)
    assert models(deployed) == [one["model"] for one in simulate(agreed, wide).rounds] == replayed(tmp_path)


@pytest.mark.parametrize("guard", ["secure_aggregation", "encryption"])
def test_what_random_k_makes_is_added_up_unopened(tmp_path, wide, guard):
    """Deployed and simulated: only so many numbers are hidden, and their sum is opened; as without the guard, to rounding."""
    sections: dict[str, Any] = {"model": {"inputs": 30}, "plan": {"rounds": 4}, "privacy": {guard: True}}
    agreed = pressed(["randomk:0.2"], cohort={"quorum": 1.0}, **sections)
    bare = simulate(pressed(["randomk:0.2"], model={"inputs": 30}, plan={"rounds": 4}), wide)
    hidden = simulate(agreed, wide)
    deployed = run(agreed, wide, tmp_path)
    assert [len(row["answered"]) for row in deployed["rounds"]] == [3, 3, 3, 3]
    assert models(deployed) == replayed(tmp_path)
    np.testing.assert_allclose(hidden.model["parameters"].values, bare.model["parameters"].values, atol=1e-5)
    if guard == "secure_aggregation":
        assert models(deployed) == [one["model"] for one in hidden.rounds]
        plain = simulate(plan(cohort={"quorum": 1.0}, **sections), wide)
        assert plain.rounds[0]["bytes"] - hidden.rounds[0]["bytes"] >= 3 * 24 * 8, "24 numbers of three nodes less"


def test_late_updates_are_opened_by_the_draws_of_their_own_round(wide):
    sections: dict[str, Any] = {"model": {"inputs": 30}, "plan": {"rounds": 8}, "cohort": {"minimum": 1, "buffer": 1}}
    uneven = {name: tuple(part[: 60 - 25 * k] for part in data) for k, (name, data) in enumerate(wide.items())}
    found = simulate(pressed(["rotate", "8bit"], **sections), uneven)
    assert any(one["late"] for one in found.rounds)
    plain = simulate(plan(**sections), uneven)
    a, b = (one.model["parameters"].values for one in (found, plain))
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), "opened by another round's signs it would be noise"


@pytest.mark.parametrize("rule", ["median", "multi_krum", "fedadam", "fednova", "feddyn", "mime_lite"])
def test_quantised_updates_go_with_every_rule(wide, rule):
    sections: dict[str, Any] = {"model": {"inputs": 30}, "aggregation": {"rule": rule}, "plan": {"rounds": 4}}
    wide |= {f"node-{k}": wider(k) for k in range(3, 5)}
    sections["cohort"] = {"minimum": 5}
    found, plain = (simulate(pressed(up, **sections), wide).model["parameters"].values for up in (["8bit"], []))
    assert np.linalg.norm(found - plain) < 0.1 * np.linalg.norm(plain)


def test_a_pool_trains_compressed_cohorts_to_the_same_bits(wide):
    agreed = pressed(["topk:0.3", "8bit"], model=MODEL)
    exact = simulate(agreed, wide).digest
    assert [simulate(agreed, wide, strategy="pool", workers=count).digest for count in (1, 2)] == [exact, exact]


@pytest.mark.parametrize("up", [["topk:0.3"], ["powersgd:1"]], ids="+".join)
def test_compiled_strategies_are_within_1e_5_of_map_for_any_number_of_workers(wide, up):
    """With what each client left out kept in between."""
    agreed = pressed(up, model=LAYERS, plan={"rounds": 3}, training={"learning_rate": 0.05})
    exact = simulate(agreed, wide, allow=[FUNCTION])
    for strategy in ("scan", "vmap"):
        alone, together = (simulate(agreed, wide, allow=[FUNCTION], strategy=strategy, workers=workers) for workers in (1, 2))
        assert alone.digest == together.digest
        assert [one["bytes"] for one in alone.rounds] == [one["bytes"] for one in exact.rounds]
        assert np.abs(alone.model["parameters"].values - exact.model["parameters"].values).max() < 1e-5


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"compression": {"up": ["4bits"]}}, "compression.up: '4bits' is no stage; did you mean '4bit'?"),
        ({"compression": {"up": ["gzip"]}}, "is no stage; known: bfloat16, 8bit"),
        ({"compression": {"up": ["topk"]}}, "behind 'topk:' stands the fraction that is kept"),
        ({"compression": {"up": ["topk:2"]}}, "above 0 and at most 1"),
        ({"compression": {"up": ["topk:0"]}}, "'topk:0': behind 'topk:' stands the fraction that is kept, above 0"),
        ({"compression": {"up": ["randomk:-0.1"]}}, "'randomk:-0.1': behind 'randomk:' stands the fraction"),
        ({"compression": {"up": ["topk:nan"]}}, "'topk:nan': behind 'topk:' stands the fraction that is kept"),
        ({"compression": {"up": ["powersgd:0"]}}, "'powersgd:0': behind 'powersgd:' stands a rank"),
        ({"compression": {"up": ["powersgd:inf"]}}, "a whole number from 1, as in 'powersgd:4'"),
        ({"compression": {"up": ["8bit", "8bit"]}}, "nothing follows '8bit', which makes codes of numbers; put it last"),
        ({"compression": {"up": ["topk:0.5", "topk:0.5"]}}, "'topk' can't follow 'topk', which chooses already"),
        ({"compression": {"up": ["rotate", "rotate"]}}, "'rotate' twice is no more than once; leave one out"),
        ({"compression": {"up": ["randomk:0.5", "powersgd:1"]}}, "'powersgd' can't follow 'randomk', which chooses already"),
        ({"compression": {"up": ["topk:1"]}}, "'topk' leaves nothing out of this model's update:"),
        ({"compression": {"up": ["powersgd:2"]}}, "'powersgd' leaves nothing out of this model's update:"),
        ({"compression": {"up": ["powersgd:1.5"]}}, "a whole number from 1, as in 'powersgd:4'"),
        ({"compression": {"up": ["8bit:3"]}}, "'8bit' takes no number; write '8bit'"),
        ({"compression": {"up": ["8bit", "rotate"]}}, "nothing follows '8bit', which makes codes of numbers; put it last"),
        ({"compression": {"up": ["topk:0.1", "randomk:0.1"]}}, "'randomk' can't follow 'topk', which chooses already"),
        ({"compression": {"up": ["rotate", "topk:0.1"]}}, "which spreads each number over many"),
        ({"compression": {"down": ["topk:1"]}}, "compression.down: 'topk' leaves nothing out of this model"),
        ({"compression": {"down": ["topk:0.1", "randomk:0.1"]}}, "'randomk' can't follow 'topk', which chooses already"),
        ({"compression": {"down": ["8bit", "4bit"]}}, "nothing follows '8bit'"),
        ({"compression": {"ups": ["8bit"]}}, "unknown key; did you mean 'up'?"),
        (
            {"compression": {"up": ["topk:0.1"]}, "aggregation": {"rule": "median"}},
            "'median' compares updates with each other, and 'topk:0.1' leaves numbers out; take '8bit'",
        ),
        ({"compression": {"up": ["8bit"]}, "aggregation": {"rule": "qffl"}}, "'qffl' sends nothing that is averaged"),
        (
            {"compression": {"up": ["8bit"]}, "privacy": {"secure_aggregation": True}},
            "take 'randomk:0.1', whose places are the same for all",
        ),
        (
            {"compression": {"up": ["topk:0.1"]}, "privacy": {"clip": 1.0}},
            "which may be longer then than privacy.clip; take '8bit'",
        ),
        ({"compression": {"up": ["8bit"]}, "aggregation": {"rule": "newton"}}, "'newton' sends nothing that is averaged"),
    ],
)
def test_what_doesnt_go_together_is_refused_in_one_line(sections, said):
    with pytest.raises(PlanError, match=re.escape(said)) as refused:
        simulate(plan(**sections), clients())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("up", [["8bit"], ["topk:0.1", "8bit"], ["randomk:0.1"], ["powersgd:4", "4bit"]], ids="+".join)
def test_a_fold_opens_blocks_and_memory_doesnt_grow_with_the_nodes(up):
    layout = Layout((Tensor("kernel", (1000, 1000)),))
    press, layouts = Press(stages(up), 1), {"parameters": layout}
    values = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    small, _ = press.encode({"parameters": Group(layout, values)}, {}, 1, "a")
    sent = b"".join(encode(Update(small, 1.0), "0" * 64))
    state, peaks = {"parameters": Group(layout, np.zeros(layout.size, np.float32))}, []
    for count in (5, 45):
        accepted = [Accepted(str(k), lambda: sent, round=1) for k in range(count)]
        tracemalloc.start()
        after = close(fedavg(), state, layouts, "0" * 64, accepted, count, press=press)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    whole = press.decode(small, layouts, 1)["parameters"].values
    np.testing.assert_allclose(after["parameters"].values, whole, atol=1e-5)
    assert peaks[1] - peaks[0] < 40 * 0.01 * layout.nbytes, "each update takes a hundredth of a model, for where its blocks begin"


def body(rogue: Rogue, task: StartTraining, path: Path) -> Update:
    return decode(path.read_bytes(), rogue.work.press.layouts(rogue.algorithm.updates(rogue.learner.layouts)), task.model)


def spoiling(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rogue, StartTraining, Envelope, Path], None]:
    def spoil(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
        update = body(rogue, task, path)
        groups = {**update.groups, name: update.groups[name].with_values(change(update.groups[name].values.copy()))}
        rogue.replace(task, encode(Update(groups, update.weight, update.metrics), task.model))

    return spoil


def longer(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    """A body that claims to be many times what the plan says: a decompression bomb."""
    update = body(rogue, task, path)
    bomb = Group(Layout((Tensor("values", (200_000,)),), "uint8"), np.zeros(200_000, np.uint8))
    rogue.replace(task, encode(Update({**update.groups, "parameters": bomb}, update.weight), task.model))


def uncompressed(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    update = body(rogue, task, path)
    groups = rogue.work.press.decode(update.groups, rogue.algorithm.updates(rogue.learner.layouts), task.round)
    rogue.replace(task, encode(Update(groups, update.weight, update.metrics), task.model))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoiling("parameters.8bit.scales", lambda scales: scales * np.float32(np.nan)), "holds NaN or infinity"),
        (spoiling("parameters.8bit.scales", lambda scales: np.full_like(scales, 3e38)), "the bound is"),
        (spoiling("parameters.topk.places", lambda places: places[::-1]), "places of numbers that don't rise"),
        (spoiling("parameters.topk.places", lambda places: places + np.uint8(200)), "lie outside of a vector of 31"),
        (spoiling("parameters.topk.counts", lambda counts: counts + np.uint16(60_000)), "their counts add up to"),
        (longer, "doesn't hold the agreed arrays"),
        (uncompressed, "doesn't hold the agreed arrays"),
    ],
    ids=["nan", "huge", "falling", "outside", "miscounted", "bomb", "plain"],
)
def test_hostile_bodies_are_set_aside_with_the_reason(tmp_path, wide, spoil, said):
    agreed = pressed(["topk:0.3", "8bit"], model={"inputs": 30}, plan={"rounds": 5}, cohort={"quorum": 1.0})

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        honest = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in wide.items()]
        rogue = Rogue(server.url, wider(7), name="rogue", directory=tmp_path / "rogue")
        rogue.spoil = lambda *what: spoil(rogue, *what) if what[0].round > 3 else None  # type: ignore[method-assign]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in [*honest, rogue]))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    store = SqlStore(tmp_path / "store")
    refused = [row for row in store.updates(history["run"]) if row.offence]
    assert len(refused) == 2
    for row in refused:
        assert said in row.reason
        kept = quarantine.path_of(tmp_path / "store", Address(row.run, row.round, row.attempt, row.node), row.digest)
        assert kept.exists()
    assert models(history) == replayed(tmp_path)
