"""Who gets in: names that the operator added, by a token that is good once, until they are revoked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.cli.test_commands import atoll as command
from tests.cli.test_commands import one_line
from tests.federation import atoll, events, plan, rows

from atoll.errors import RefusedError
from atoll.keys import Identity
from atoll.logs.upload import HttpAppender
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.store.enrolment import Enrolment
from atoll.store.sql import SqlStore
from atoll.wire import Address, seal


@pytest.fixture
def enrolment(tmp_path: Path) -> Iterator[Enrolment]:
    found = Enrolment(tmp_path / "store")
    yield found
    found.close()


def admit(enrolment: Enrolment, name: str, identity: Identity, token: str | None = None) -> None:
    proof = Identity.of(token).sign(b"hello").hex() if token else ""
    enrolment.admit(name, identity.public, proof, b"hello")


def test_the_door_is_open_until_the_first_name_is_added(enrolment):
    north, stranger = Identity.new(), Identity.new()
    admit(enrolment, "anybody", stranger)
    token = enrolment.add("north")
    for name, identity, shown, said in (
        ("anybody", stranger, None, "no node 'anybody' is enrolled on this server; its operator can `atoll nodes add anybody`"),
        ("north", north, None, "'north' joins for the first time: with the --token"),
        ("north", north, "f" * 48, "the token is not the one that was made for 'north'"),
    ):
        with pytest.raises(RefusedError, match=said):
            admit(enrolment, name, identity, shown)
    admit(enrolment, "north", north, token)
    admit(enrolment, "north", north)
    with pytest.raises(RefusedError, match="bound to another key, and its token used"):
        admit(enrolment, "north", stranger, token)
    with pytest.raises(RefusedError, match="its key is that of --name north"):
        admit(enrolment, "south", north)
    assert [(one.name, one.state, one.node) for one in enrolment.all()] == [("north", "joined", north.node)]


def test_who_is_revoked_stays_out_until_added_again(enrolment):
    north = Identity.new()
    admit(enrolment, "north", north, enrolment.add("north"))
    with pytest.raises(RefusedError, match="'north' is joined already; for a new token first `atoll nodes revoke north`"):
        enrolment.add("north")
    enrolment.revoke("north")
    assert enrolment.revoked() == {north.node}
    with pytest.raises(RefusedError, match="the node 'north' was revoked"):
        admit(enrolment, "north", north)
    with pytest.raises(RefusedError, match="'north' is not enrolled; there are: none"):
        enrolment.revoke("north")
    token = enrolment.add("north")
    admit(enrolment, "north", north, token)
    assert enrolment.revoked() == frozenset()


def test_a_stolen_store_holds_no_token(enrolment, tmp_path):
    token = enrolment.add("north")
    for path in (tmp_path / "store").iterdir():
        assert token.encode() not in path.read_bytes()
    with pytest.raises(RefusedError, match="the token is not the one"):
        admit(enrolment, "north", Identity.new(), enrolment.all()[0].token)


def test_by_command_over_tls_with_tokens(tmp_path):
    """Real processes: without a token nobody comes in, with it everybody does, and no token stands in any log or file."""
    path, store = tmp_path / "plan.json", tmp_path / "store"
    path.write_text(plan(cohort={"minimum": 3, "deadline": 60, "quorum": 1.0}, plan={"rounds": 2}).to_json())
    enrolment = Enrolment(store)
    tokens = {f"node-{k}": enrolment.add(f"node-{k}") for k in range(2)}
    enrolment.close()
    tokens["node-2"] = json.loads(command("nodes", "add", "node-2", "--store", store, "--json").stdout)["token"]
    with contextlib.ExitStack() as stack:
        words = ["serve", path, "--port", "0", "--store", store, "--tls", "--json"]
        server = stack.enter_context(atoll(*words, log=tmp_path / "server.log"))
        heard = events(server)
        listening = next(event for event in heard if event["what"] == "listening")

        def join(name: str, place: str, *more: str) -> list[str | Path]:
            data = ["--data", tmp_path / "rows.npz", "--dir", tmp_path / place, "--pin", listening["pin"]]
            return ["join", listening["url"], "--name", name, *data, *more]

        np.savez(tmp_path / "rows.npz", x=rows(1)[0], y=rows(1)[1])
        assert "'node-0' joins for the first time" in one_line(command(*join("node-0", "thief")))
        nodes = [
            stack.enter_context(atoll(*join(name, name, "--token", token), log=tmp_path / f"{name}.log"))
            for name, token in tokens.items()
        ]
        history = next(event for event in heard if event["what"] == "history")
        assert [node.wait(30) for node in nodes] == [0, 0, 0]
    assert [row["answered"] for row in history["rounds"]] == [["node-0", "node-1", "node-2"]] * 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(token.encode() in path.read_bytes() for token in tokens.values() for path in files)


class Slow(Node):
    """A node that is asked, and never gets done."""

    async def _train(self, task: Any) -> str:
        await asyncio.Event().wait()
        return ""


def test_who_is_revoked_in_mid_round_is_gone_at_once_and_the_round_goes_on(tmp_path):
    """With quorum 1 the round would wait a minute for it; nothing of it counts any more, and it may not come back."""
    agreed = plan(plan={"rounds": 2}, cohort={"minimum": 2, "deadline": 60, "quorum": 1.0})
    enrolment = Enrolment(tmp_path / "store")
    told: list[Any] = []

    async def together() -> Any:
        asked, gone, here = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def watch(event: Any) -> None:
            told.append(event)
            {"asked": asked, "revoked": gone, "joined": here}.get(event["what"], asyncio.Event()).set()

        def node(kind: type[Node], name: str) -> Node:
            return kind(server.url, rows(1), name=name, directory=tmp_path / name, token=enrolment.add(name))

        server = Server(agreed, store=tmp_path / "store", port=0, watch=watch)
        serving = asyncio.create_task(server.serve_async())
        slow = node(Slow, "slow")
        revoked = asyncio.create_task(slow.start_async())
        await here.wait()
        north = asyncio.create_task(node(Node, "north").start_async())
        await asked.wait()
        began = asyncio.get_running_loop().time()
        enrolment.revoke("slow")
        await gone.wait()
        assert asyncio.get_running_loop().time() - began < 5  # half a second, and a busy machine
        body = [memoryview(b"late")]
        late = seal(slow.identity, Address(server.run, server.drive.state.round, 1, slow.identity.node), agreed.digest, body)
        async with aiohttp.ClientSession() as session:
            with pytest.raises(RefusedError, match="the node was revoked"):
                await HttpAppender(server.url, session).append(late, body)
        with pytest.raises(RefusedError, match="the node 'slow' was revoked by the server's operator"):
            await revoked
        await node(Node, "east").start_async()
        await north
        return await serving

    history = asyncio.run(asyncio.wait_for(together(), 50))
    enrolment.close()
    store = SqlStore(tmp_path / "store")
    said = [json.loads(link.entry) for link in store.links(history["run"])]
    store.close()
    (node,) = [one["node"] for one in said if one["what"] == "revoked"]
    assert [one["name"] for one in said if one["what"] == "admitted" and one["node"] == node] == ["slow"]
    assert [row["answered"] for row in history["rounds"]] == [["east", "north"]] * 2
    assert [event["name"] for event in told if event["what"] == "revoked"] == ["slow"]


def test_commands_and_their_mistakes(tmp_path):
    store = tmp_path / "store"
    assert "the server lets everybody in" in command("nodes", "list", "--store", store).stdout
    assert "'a b' is no name of a node" in one_line(command("nodes", "add", "a b", "--store", store))
    assert "shown this once: " in command("nodes", "add", "north", "--store", store).stdout
    assert "'south' is not enrolled; there are: north" in one_line(command("nodes", "revoke", "south", "--store", store))
    made = json.loads(command("keys", "new", "--dir", tmp_path / "north", "--json").stdout)
    assert made["node"] == Identity.at(tmp_path / "north" / "node.key").node
    assert stat.S_IMODE((tmp_path / "north" / "node.key").stat().st_mode) == 0o600
    assert f"holds the key of node {made['node']} already" in one_line(command("keys", "new", "--dir", tmp_path / "north"))
