"""A node that is offered a poisoned model says no in one line, whatever is wrong with it, and takes part in the next round."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from tests.federation import plan, rows

from atoll.learners.logistic import Logistic
from atoll.messages import EndSession, Message, StartTraining
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.vector import Group, Layout, Tensor
from atoll.wire import HEADER_LIMIT, pack


def model(kernel: list[float], dtype: Any = "float64") -> bytes:
    """A model of the plan's names, with this kernel."""
    layout = Layout((Tensor("kernel", (len(kernel),)), Tensor("bias", (1,))), dtype)
    return b"".join(pack({"parameters": Group(layout, np.array([*kernel, 0.0], dtype))}))


def named(body: bytes) -> tuple[str, bytes]:
    return hashlib.sha256(body).hexdigest(), body


def tiny() -> list[float]:
    return [0.0] * 4


POISON: dict[str, tuple[Callable[[], tuple[str, bytes]], str]] = {
    "not a number": (lambda: named(model([0.0, np.nan, 0.0, 0.0])), "holds NaN or infinity (in group 'parameters')"),
    "infinite": (lambda: named(model([0.0, 0.0, 0.0, -np.inf])), "holds NaN or infinity (in group 'parameters')"),
    "another shape": (lambda: named(model([0.0] * 5)), "the body doesn't hold the agreed arrays: 'parameters/kernel' is"),
    "another dtype": (lambda: named(model(tiny(), "float32")), "the body doesn't hold the agreed arrays: 'parameters/kernel' is"),
    "no model": (lambda: named(b"\x80\x04never a model"), "no safetensors body"),
    "cut short": (lambda: named(model(tiny())[:-8]), "truncated or doubled"),
    "too long": (lambda: named(model(tiny()) + bytes(HEADER_LIMIT + (1 << 20))), "more than the plan's can have"),
    "other bytes": (lambda: ("ab" * 32, model([1.0, 2.0, 3.0, 4.0])), "the model that came is not abababababab"),
}


@pytest.mark.parametrize("what", POISON)
def test_a_node_refuses_a_poisoned_model_in_one_line_and_stays_usable(tmp_path, monkeypatch, what):
    make, said = POISON[what]
    digest, body = make()
    looked = 0
    heard: dict[str, list[dict[str, Any]]] = {f"n{k}": [] for k in range(3)}
    server = Server(plan(plan={"rounds": 2}, cohort={"quorum": 1.0}), store=tmp_path / "store", port=0)
    (tmp_path / "store" / "models" / f"{digest}.safetensors").write_bytes(body)
    tell_all, evaluate = server.channel.tell_all, Logistic.evaluate

    async def poisoned(names: Iterable[str], message: Message) -> None:
        """Offer the poisoned model first, and at the end again."""
        first = isinstance(message, StartTraining) and (message.round, message.attempt) == (1, 1)
        if first or isinstance(message, EndSession):
            message = message.model_copy(update={"model": digest})
        await tell_all(names, message)

    def counted(self: Logistic, *given: Any) -> Any:
        nonlocal looked
        looked += 1
        return evaluate(self, *given)

    monkeypatch.setattr(server.channel, "tell_all", poisoned)
    monkeypatch.setattr(Logistic, "evaluate", counted)
    data = dict(zip(heard, map(rows, range(3)), strict=True))
    nodes = [Node(server.url, data[name], name=name, directory=tmp_path / name, watch=heard[name].append) for name in heard]

    async def together() -> Any:
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["outcome"] == "completed"
    assert [(row["round"], row["attempt"], len(row["answered"])) for row in history["rounds"]] == [(1, 2, 3), (2, 1, 3)]
    assert looked == 6, "no row is looked at with a poisoned model"
    for name, events in heard.items():
        (declined,) = [event["reason"] for event in events if event["what"] == "declined"]
        (at_the_end,) = [event["reason"] for event in events if event["what"] == "not_kept"]
        for line in (declined, at_the_end):
            assert said in line
            assert "\n" not in line
        assert not (tmp_path / name / "final.safetensors").exists()
        assert not any((tmp_path / name / "model").glob(f"{digest}*")) or what not in ("too long", "other bytes")
    assert not any(node.kept for node in nodes)
