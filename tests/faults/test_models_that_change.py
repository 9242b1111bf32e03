"""A model that isn't the agreed one any more: its node declines, or stays out, in one line; the others go on, nothing is lost."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.federation import clients, plan, rows
from tests.learners import jax_models

from atoll.errors import LearnerError
from atoll.learner import Fit
from atoll.learners.logistic import Logistic
from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.vector import Group, Layout, Tensor


def other_shapes(fit: Fit) -> Fit:
    group = Group(Layout((Tensor("kernel", (3,)), Tensor("bias", (1,))), "float64"), np.zeros(4))
    return Fit({"parameters": group}, fit.metrics)


def other_names(fit: Fit) -> Fit:
    layout = Layout((Tensor("weights", (4,)), Tensor("bias", (1,))), "float64")
    return Fit({"parameters": replace(fit.groups["parameters"], layout=layout)}, fit.metrics)


def other_dtype(fit: Fit) -> Fit:
    group = fit.groups["parameters"]
    return Fit({"parameters": Group(replace(group.layout, dtype="float32"), group.values.astype(np.float32))}, fit.metrics)


def one_group_more(fit: Fit) -> Fit:
    return Fit({**fit.groups, "buffers": fit.groups["parameters"]}, fit.metrics)


class Changing(Logistic):
    """A learner that does well in its first round, and gives something else from then on."""

    def __init__(self, change: Any) -> None:
        super().__init__(4, 0.5)
        self.change, self.fits = change, 0

    def fit(self, *args: Any, **options: Any) -> Fit:
        self.fits += 1
        fit = super().fit(*args, **options)
        return fit if self.fits == 1 else self.change(fit)


class Patient(Node):
    """An honest node that holds the second round open until the odd one is there."""

    there: threading.Event

    def _work(self, task: StartTraining, body: Any) -> str:
        assert task.round != 2 or self.there.wait(30)
        return super()._work(task, body)


def run_with(place: Path, kind: type[Node] = Node, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run six rounds of three honest nodes and an odd one, which joins once the first is open and is there in the third.

    Returns the history, and what the odd one was told.
    """
    heard: list[dict[str, Any]] = []
    there = threading.Event()

    def watch(event: Any) -> None:
        heard.append(event)
        if event["what"] == "connected":
            there.set()

    async def together() -> dict[str, Any]:
        begun = asyncio.Event()
        server = Server(
            plan(plan={"rounds": 6}), store=place / "store", port=0, watch=lambda event: event["what"] == "asked" and begun.set()
        )
        nodes: list[Node] = [Patient(server.url, data, name=name, directory=place / name) for name, data in clients().items()]
        for node in nodes:
            node.there = there  # type: ignore[attr-defined]
        odd = kind(server.url, rows(9), name="odd", directory=place / "odd", watch=watch, **options)

        async def late() -> None:
            await begun.wait()
            await odd.start_async()

        history, *_ = await asyncio.gather(server.serve_async(), late(), *(node.start_async() for node in nodes))
        return history

    return asyncio.run(asyncio.wait_for(together(), 60)), heard


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_shapes, "'kernel' (3,) instead of 'kernel' (4,)"),
        (other_names, "'weights' (4,) instead of 'kernel' (4,)"),
        (other_dtype, "float32 (weighted) instead of float64 (weighted)"),
        (one_group_more, "groups ['buffers', 'parameters'] are not the agreed ones: ['parameters']"),
    ],
)
def test_a_learner_whose_layout_changes_declines(tmp_path, change, said):
    history, heard = run_with(tmp_path, learner=Changing(change))
    assert history["outcome"] == "completed"
    assert len(history["rounds"]) == 6
    took_part = [row["answered"] for row in history["rounds"] if "odd" in row["answered"]]
    assert len(took_part) == 1, "what it gave in its first round counts"
    assert [row["answered"] for row in history["rounds"] if row["answered"] not in took_part] == [[*clients()]] * 5
    told = [one for row in history["rounds"] for one in row["refused"]]
    assert told
    assert {(one["name"], one["status"]) for one in told} == {("odd", "declined")}
    assert all(said in one["reason"] and "\n" not in one["reason"] for one in told)
    assert {event["reason"] for event in heard if event["what"] == "declined"} == {one["reason"] for one in told}


class Fickle(Node):
    """A node whose model is another one as soon as it has joined."""

    def _work(self, task: StartTraining, body: Any) -> str:
        self.work = replace(self.work, learner=Logistic(5, 0.5))
        return super()._work(task, body)


def test_a_node_whose_model_is_another_one_declines(tmp_path):
    history, _ = run_with(tmp_path, Fickle)
    assert [row["answered"] for row in history["rounds"]] == [[*clients()]] * 6
    told = [one for row in history["rounds"] for one in row["refused"]]
    assert told
    assert all("the plan's model takes 5 numbers a row" in one["reason"] and "\n" not in one["reason"] for one in told)


class Renamed(Logistic):
    """Another version of the plan's model, on one node alone."""

    def __init__(self) -> None:
        super().__init__(4, 0.5)
        self.layouts = {"parameters": Layout((Tensor("weights", (4,)), Tensor("bias", (1,))), "float64")}


def test_a_node_with_another_version_of_the_model_declines_and_the_others_go_on(tmp_path):
    history, _ = run_with(tmp_path, learner=Renamed())
    assert [row["answered"] for row in history["rounds"]] == [[*clients()]] * 6
    told = {one["reason"] for row in history["rounds"] for one in row["refused"]}
    assert told == {"the body doesn't hold the agreed arrays: 'parameters/weights' is missing"}


def test_a_function_that_makes_another_model_each_time_keeps_its_node_out(tmp_path, monkeypatch):
    """The server's copy of the function is steady; on one node it isn't, and that node says so before it promises anything."""
    name = "tests.learners.jax_models:linear"
    agreed = plan(
        model={"logistic": False, "inputs": None, "jax": name, "loss": "sigmoid_binary_cross_entropy", "options": {"inputs": 4}}
    )
    steady, sizes = jax_models.linear, iter(range(4, 99))

    async def together() -> Any:
        server = Server(agreed, store=tmp_path / "store", port=0, allow=[name])
        nodes = [Node(server.url, data, name=one, directory=tmp_path / one, allow=[name]) for one, data in clients().items()]
        odd = Node(server.url, rows(9), name="odd", directory=tmp_path / "odd", allow=[name])
        serving = asyncio.create_task(server.serve_async())
        fickle = steady(4)._replace(init=lambda key: steady(next(sizes)).init(key))
        monkeypatch.setattr(jax_models, "linear", lambda inputs: fickle)
        with pytest.raises(LearnerError) as caught:
            await odd.start_async()
        monkeypatch.setattr(jax_models, "linear", steady)
        history, *_ = await asyncio.gather(serving, *(node.start_async() for node in nodes))
        return history, str(caught.value)

    history, said = asyncio.run(asyncio.wait_for(together(), 100))
    assert "another model than the first time: 'kernel' (5, 1) instead of 'kernel' (4, 1)" in said
    assert "\n" not in said
    assert [row["answered"] for row in history["rounds"]] == [[*clients()]] * 3
