"""Bad updates and bad peers: refused in one line on the side that caused it, counted, and the round goes on without them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import socketio
from tests.federation import clients, plan, rows, run

from atoll.errors import AtollError, GaveUpError, PlanError, RefusedError, UnreachableError, WireError
from atoll.keys import Identity
from atoll.learners.logistic import Logistic
from atoll.messages import NAMESPACE, StartTraining
from atoll.node import offer
from atoll.node.events import Event, Trained
from atoll.node.offer import greeting
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server import challenge
from atoll.server.challenge import Challenges
from atoll.server.runtime import Server
from atoll.store.sql import SqlStore
from atoll.vector import Group, Layout, Tensor, Update
from atoll.wire import Address, Envelope, decode, encode, seal

Spoil = Callable[["Rogue", StartTraining, Envelope, Path], None]


class Rogue(Node):
    """A node that sends something else than it trained."""

    spoil: Spoil
    heard: list[dict[str, Any]]

    async def _made(self, task: StartTraining) -> Event:
        resent = self.outbox.kept(self._address(task)) is not None
        event = await super()._made(task)
        if not isinstance(event, Trained) or resent:
            return event
        envelope, path = self.outbox.take(self._address(task))
        self.spoil(task, envelope, path)
        return replace(event, digest=self.outbox.take(self._address(task))[0].digest)

    def replace(self, task: StartTraining, parts: list[memoryview], address: Address | None = None, identity: Any = None) -> None:
        """Keep another body in place of the honest one, well sealed."""
        envelope = seal(identity or self.identity, address or self._address(task), self.plan.digest, parts)
        body, note = self.outbox._paths(self._address(task))
        body.write_bytes(b"".join(parts))
        note.write_text(envelope.to_header())

    def update(self, task: StartTraining, path: Path) -> Update:
        return decode(path.read_bytes(), self.algorithm.updates(self.learner.layouts), task.model)


def not_finite(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    update = rogue.update(task, path)
    group = update.groups["parameters"]
    values = group.values.copy()
    values[2] = np.nan
    rogue.replace(task, encode(Update({"parameters": group.with_values(values)}, update.weight), task.model))


def other_layout(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    group = Group(Layout((Tensor("kernel", (5,)),), "float64"), np.zeros(5))
    rogue.replace(task, encode(Update({"parameters": group}, 1.0), task.model))


def other_model(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    rogue.replace(task, encode(rogue.update(task, path), "0" * 64))


def weightless(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    update = rogue.update(task, path)
    rogue.replace(task, encode(Update(update.groups, -1.0), task.model))


def no_body_at_all(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    rogue.replace(task, [memoryview(b"never a safetensors file")])


def nested_too_deep(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    header = b"[" * 4000
    rogue.replace(task, [memoryview(len(header).to_bytes(8, "little") + header)])


def truncated(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    rogue.replace(task, [memoryview(path.read_bytes()[:-8])])


def doubled(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    rogue.replace(task, [memoryview(path.read_bytes() * 2)])


def wrong_round(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    address = rogue._address(task)._replace(round=task.round + 5)
    rogue.replace(task, encode(rogue.update(task, path), task.model), address)


def unknown_node(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    stranger = Identity.new()
    address = rogue._address(task)._replace(node=stranger.node)
    rogue.replace(task, encode(rogue.update(task, path), task.model), address, stranger)


def altered_bytes(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)


def altered_signature(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    forged = envelope._replace(signature=bytes(64))
    path.with_suffix(".json").write_text(forged.to_header())


def too_large(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    rogue.replace(task, [memoryview(bytes(4 << 20))])


@pytest.mark.parametrize(
    ("spoil", "status", "said"),
    [
        (not_finite, "rejected", "'kernel' in group 'parameters' holds NaN or infinity"),
        (other_layout, "rejected", "the body doesn't hold the agreed arrays"),
        (other_model, "rejected", "the update started from model 000000000000"),
        (weightless, "rejected", "weight is not positive"),
        (no_body_at_all, "rejected", "no safetensors body"),
        (nested_too_deep, "rejected", "its header is no JSON"),
        (truncated, "rejected", "truncated or doubled"),
        (doubled, "rejected", "truncated or doubled"),
        (wrong_round, "declined", "too late or too early"),
        (unknown_node, "declined", "the node never joined this run"),
        (altered_bytes, "rejected", "the body isn't what its envelope says"),
        (altered_signature, "declined", "signature"),
        (too_large, "declined", "the limit is"),
    ],
)
def test_a_bad_update_is_refused_and_the_round_goes_on(tmp_path, spoil, status, said):
    agreed = plan(plan={"rounds": 2})
    heard: list[dict[str, Any]] = []

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        honest = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
        rogue = Rogue(server.url, rows(7), name="rogue", directory=tmp_path / "rogue", watch=heard.append)
        rogue.spoil = spoil.__get__(rogue)
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in [*honest, rogue]))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["outcome"] == "completed"
    assert [len(row["answered"]) for row in history["rounds"]] == [3, 3]
    assert all("rogue" not in row["answered"] for row in history["rounds"])
    # A round that began with two honest nodes only is tried again: that is told of their updates, and isn't looked at here.
    honest = {row.node for row in SqlStore(tmp_path / "store").updates(history["run"]) if row.status == "accepted"}
    counted = [row for row in SqlStore(tmp_path / "store").updates(history["run"]) if row.node not in honest]
    assert 2 in {row.round for row in counted}
    assert all(row.status == status and said in row.reason and "\n" not in row.reason for row in counted)
    told = [event["reason"] for event in heard if event.get("reason")]
    assert any(said in reason for reason in told), told


def gives_up(agreed: Plan, data: dict[str, Any], place: Path) -> str:
    """Run a federation that gives up; return what it says."""

    async def together() -> Any:
        server = Server(agreed, store=place / "store", port=0)
        nodes = [Node(server.url, one, name=name, directory=place / name) for name, one in data.items()]
        with np.errstate(all="ignore"):
            history, *_ = await asyncio.gather(
                server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True
            )
        return history

    ended = asyncio.run(asyncio.wait_for(together(), 60))
    assert isinstance(ended, GaveUpError)
    assert ended.exit_code == 3
    assert SqlStore(place / "store").history()["outcome"] == "gave_up"
    return str(ended)


def test_a_node_that_cannot_train_declines_with_the_reason(tmp_path):
    agreed = plan(plan={"rounds": 1}, training={"learning_rate": 1e300})
    huge = {f"n{k}": (1e200 * rows(k)[0], rows(k)[1]) for k in range(3)}
    assert "lower training.learning_rate" in gives_up(agreed, huge, tmp_path)


def test_a_node_that_is_sent_a_poisoned_model_declines_before_it_looks_at_its_rows(tmp_path, monkeypatch):
    looked: list[Any] = []
    monkeypatch.setattr(Logistic, "initial", lambda self, seed: _poisoned(self))
    monkeypatch.setattr(Logistic, "evaluate", lambda *given: looked.append(given) or {})
    said = gives_up(plan(plan={"rounds": 1}), {f"n{k}": rows(k) for k in range(3)}, tmp_path)
    assert "the model that the server sent holds NaN or infinity (in group 'parameters')" in said
    assert "\n" not in said
    assert not looked


def _poisoned(learner: Logistic) -> dict[str, Group]:
    layout = learner.layouts["parameters"]
    values = np.zeros(layout.size)
    values[1] = np.inf
    return {"parameters": Group(layout, values)}


async def _shake_hands(server: Server, hello: dict[str, Any]) -> Any:
    client = socketio.AsyncClient(reconnection=False)
    heard: list[Any] = []
    client.on("connect_error", heard.append, namespace=NAMESPACE)
    try:
        await client.connect(server.url, namespaces=[NAMESPACE], auth=hello, transports=["websocket"], wait_timeout=5)
    except socketio.exceptions.ConnectionError:
        return heard[-1]
    finally:
        await client.disconnect()
    return {"message": "welcome"}


def _greeting(server: Server) -> dict[str, Any]:
    offered = {"run": server.run, "digest": server.plan.digest, "challenge": server.challenge()}
    return greeting(Identity.new(), "peer", offered).payload()


async def _hello_to(place: Path, talk: Callable[[Server], Coroutine[Any, Any, Any]]) -> Any:
    server = Server(plan(), store=place / "store", port=0)
    serving = asyncio.create_task(server.serve_async())
    try:
        return await talk(server)
    finally:
        server.stop()
        await serving


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "welcome"),
        ({"v": 1}, "protocol version 1: this side speaks 2; upgrade the older one"),
        ({"signature": "0" * 128}, "the handshake's signature doesn't fit its key"),
        ({"plan": "0" * 64}, "signature"),
        ({"challenge": "0" * 112}, "signature"),
        ({"challenge": None}, "no 'connect' message: challenge"),
        ({"name": "../../etc"}, "no 'connect' message: name"),
        ({"more": 1}, "no 'connect' message: more"),
    ],
)
def test_who_may_not_come_in_hears_why(tmp_path, changed, said):
    def talk(server: Server) -> Coroutine[Any, Any, Any]:
        return _shake_hands(server, {**_greeting(server), **changed})

    assert said in asyncio.run(asyncio.wait_for(_hello_to(tmp_path, talk), 60))["message"]


def test_a_handshake_that_was_overheard_opens_nothing(tmp_path):
    async def talk(server: Server) -> list[Any]:
        overheard = _greeting(server)
        return [await _shake_hands(server, overheard) for _ in range(2)]

    first, replayed = asyncio.run(asyncio.wait_for(_hello_to(tmp_path, talk), 60))
    assert first == {"message": "welcome"}
    assert "answers no challenge that is open" in replayed["message"]
    assert replayed["data"] == {"again": True}


def test_a_challenge_of_another_server_or_time_is_none(monkeypatch):
    challenges = Challenges()
    old = challenges.new()
    with pytest.raises(UnreachableError, match="no challenge that is open"):
        Challenges().take(old)
    monkeypatch.setattr(challenge.time, "monotonic", lambda now=time.monotonic: now() + challenge.LIFE)
    with pytest.raises(UnreachableError, match="no challenge that is open"):
        challenges.take(old)
    challenges.take(fresh := challenges.new())
    assert list(challenges._used) == [fresh]


def test_a_node_that_is_told_so_answers_a_new_challenge(tmp_path, monkeypatch):
    """The server was started anew between its offer and the handshake: no refusal for good."""
    taken: list[str] = []
    take = Challenges.take

    def once_refused(self: Challenges, one: str) -> None:
        taken.append(one)
        take(self, one if len(taken) > 1 else "00" * 56)

    monkeypatch.setattr(Challenges, "take", once_refused)
    history = run(plan(plan={"rounds": 1}, cohort={"minimum": 1}), {"one": rows(1)}, tmp_path)
    assert history["outcome"] == "completed"
    assert len(set(taken)) == 2


def test_a_name_belongs_to_one_node(tmp_path):
    async def together() -> Any:
        server = Server(plan(cohort={"minimum": 2}, plan={"rounds": 1}), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        twins = [Node(server.url, rows(k), name="twin", directory=tmp_path / f"twin-{k}") for k in range(2)]
        both = [asyncio.create_task(twin.start_async()) for twin in twins]
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)  # one is in and waits, one is out
        await Node(server.url, rows(2), name="other", directory=tmp_path / "other").start_async()
        await asyncio.wait(both)
        return await serving, done.pop().exception()

    history, refused = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["rounds"][0]["answered"] == ["other", "twin"]
    assert isinstance(refused, RefusedError)
    assert "the name 'twin' belongs to another node of this run; choose another --name" in str(refused)


def test_a_node_takes_part_only_in_the_plan_it_agreed_to(tmp_path):
    async def together() -> None:
        server = Server(plan(), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        try:
            await Node(server.url, rows(1), directory=tmp_path / "node", plan="0" * 64).start_async()
        finally:
            server.stop()
            await serving

    with pytest.raises(RefusedError, match="this node takes part in 000000"):
        asyncio.run(asyncio.wait_for(together(), 60))


def test_a_server_of_another_protocol_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(offer, "PROTOCOL", 1)

    async def together() -> None:
        server = Server(plan(), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        try:
            await Node(server.url, rows(1), directory=tmp_path / "node").start_async()
        finally:
            server.stop()
            await serving

    with pytest.raises(WireError, match="speaks protocol 2, this node 1: upgrade the older one"):
        asyncio.run(asyncio.wait_for(together(), 60))


@pytest.mark.parametrize("answer", [b"<html>", b"7", b"[" * 4000])
def test_what_is_no_atoll_server_is_told_in_one_line(tmp_path, monkeypatch, answer):
    async def get(session, url, path):
        return answer

    monkeypatch.setattr(offer, "_get", get)
    with pytest.raises(WireError, match=r"http://other/v1/plan is no plan: is it another program's address\?"):
        asyncio.run(asyncio.wait_for(Node("http://other", rows(1), directory=tmp_path / "node").start_async(), 60))


def test_rows_that_do_not_fit_the_plan_keep_a_node_out(tmp_path):
    async def together() -> None:
        server = Server(plan(), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        try:
            await Node(server.url, (np.zeros((3, 7)), np.zeros(3)), directory=tmp_path / "node").start_async()
        finally:
            server.stop()
            await serving

    with pytest.raises(AtollError, match=r"rows of shape \(7,\), the plan's model takes 4 numbers"):
        asyncio.run(asyncio.wait_for(together(), 60))


def test_a_keras_model_with_code_in_it_never_reaches_keras(tmp_path):
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": {"class_name": "__lambda__"}}}
    model = {"module": "keras", "class_name": "Sequential", "config": {"layers": [layer]}, "registered_name": None}
    agreed = plan(model={"logistic": False, "keras": model, "loss": "binary_crossentropy"})
    with pytest.raises(PlanError, match="Lambda"):
        Server(agreed, store=tmp_path / "store", port=0)


def test_the_port_the_store_and_the_http_routes_say_what_is_wrong(tmp_path):
    async def together() -> None:
        server = Server(plan(), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        try:
            taken = int(server.url.rpartition(":")[2])
            with pytest.raises(AtollError, match=f"can't listen on 127.0.0.1 port {taken}"):
                Server(plan(), store=tmp_path / "other", port=taken)
            async with aiohttp.ClientSession(server.url) as session:
                for path, status in {"/v1/models/00": 404, "/v1/runs/none": 404, "/healthz": 200, "/v1/status": 200}.items():
                    async with session.get(path) as response:
                        assert response.status == status, path
                        assert await response.json()
        finally:
            server.stop()
            await serving

    asyncio.run(asyncio.wait_for(together(), 60))
    (tmp_path / "file").write_text("")
    with pytest.raises(AtollError, match="can't be a store"):
        Server(plan(), store=tmp_path / "file", port=0)
