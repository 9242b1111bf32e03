"""A node holds its server to the key it first saw, and to the record that it was shown."""

from __future__ import annotations

import asyncio
import stat

import pytest
from tests.federation import clients, plan, run

from atoll.chain import Chain
from atoll.errors import RefusedError, StoreError
from atoll.keys import Identity
from atoll.messages import ConnectionReceived, Head, Verdict
from atoll.node.runtime import Node
from atoll.node.witness import Witness
from atoll.server.runtime import Server
from atoll.store.ledger import Ledger

URL, PLAN = "http://127.0.0.1:8740", "a" * 64


class Talk:
    """What a server would say, from a chain of its own."""

    def __init__(self, identity: Identity) -> None:
        self.chain = Chain(identity, "run", PLAN)
        self.more()

    def more(self) -> None:
        self.chain.last = self.chain.next({"what": f"entry {self.chain.last}"})

    @property
    def head(self) -> Head:
        last = self.chain.last
        assert last
        return Head(number=last.number, digest=last.head, signature=last.signature)

    def welcome(self) -> ConnectionReceived:
        return ConnectionReceived(run="run", plan=PLAN, rounds=3, round=1, key=self.chain.key, head=self.head)

    def verdict(self) -> Verdict:
        return Verdict(run="run", round=1, attempt=1, digest="d" * 64, accepted=True, head=self.head)


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


def test_the_first_key_counts_and_another_is_refused(tmp_path, ledger):
    talk, other = Talk(Identity.new()), Talk(Identity.new())
    Witness(tmp_path, URL, ledger).heard(talk.welcome(), PLAN)
    assert (tmp_path / "known_servers").read_text() == f"{URL} {talk.chain.key}\n"
    again = Witness(tmp_path, f"{URL}/", ledger)
    again.heard(talk.welcome(), PLAN)
    with pytest.raises(
        RefusedError, match=f"has key {other.chain.key[:12]}, but had {talk.chain.key[:12]} before.*remove its line"
    ):
        again.heard(other.welcome(), PLAN)
    with pytest.raises(RefusedError, match="has no key, but had"):
        again.heard(ConnectionReceived(run="run", plan=PLAN, rounds=3, round=1), PLAN)
    Witness(tmp_path, "http://127.0.0.1:9999", ledger).heard(other.welcome(), PLAN)  # another address, another server


def test_what_is_not_signed_by_that_key_is_refused(tmp_path, ledger):
    talk = Talk(Identity.new())
    witness = Witness(tmp_path, URL, ledger)
    witness.heard(talk.welcome(), PLAN)
    good = talk.verdict()
    for wrong in (
        {"head": None},
        {"run": "another"},
        {"head": good.head.model_copy(update={"number": 2})},
        {"head": good.head.model_copy(update={"digest": "0" * 64})},
        {"head": good.head.model_copy(update={"signature": good.head.signature.upper()})},
        {"head": Talk(Identity.new()).head},
    ):
        with pytest.raises(RefusedError, match="is not signed by its key"):
            witness.heard(good.model_copy(update=wrong), PLAN)
    with pytest.raises(RefusedError, match="is not signed by its key"):
        witness.heard(good, "b" * 64)
    witness.heard(good, PLAN)


def test_a_record_that_contradicts_what_was_shown_is_refused_and_kept(tmp_path, ledger):
    identity = Identity.new()
    talk = Talk(identity)
    talk.more()
    Witness(tmp_path, URL, ledger).heard(talk.welcome(), PLAN)
    rewritten = Talk(identity)
    rewritten.chain.last = rewritten.chain.next({"what": "another second entry"})
    with pytest.raises(RefusedError, match="entry 2 of run run's record is not the one that it showed before"):
        Witness(tmp_path, URL, ledger).heard(rewritten.verdict(), PLAN)
    assert [one.head for one in ledger.heads()] == [talk.head.digest, rewritten.head.digest]


def test_a_server_that_never_signed_is_taken_as_it_is(tmp_path, ledger):
    Witness(tmp_path, URL, ledger).heard(ConnectionReceived(run="run", plan=PLAN, rounds=3, round=1), PLAN)
    assert not (tmp_path / "known_servers").exists()


def test_known_servers_that_can_not_be_read(tmp_path, ledger):
    (tmp_path / "known_servers").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=r"known_servers: can't be read .*; mend it, or move it away"):
        Witness(tmp_path, URL, ledger)


def test_a_node_leaves_a_server_whose_key_changed(tmp_path):
    run(plan(), clients(), tmp_path)
    assert stat.S_IMODE((tmp_path / "store" / "server.key").stat().st_mode) == 0o600

    async def again() -> None:
        server = Server(plan(), store=tmp_path / "new", port=0)
        (tmp_path / "node-0" / "known_servers").write_text(f"{server.url} {'0' * 64}\n")
        serving = asyncio.create_task(server.serve_async())
        node = Node(server.url, clients()["node-0"], name="node-0", directory=tmp_path / "node-0")
        with pytest.raises(RefusedError, match="but had 000000000000 before"):
            await node.start_async()
        server.stop()
        await serving

    asyncio.run(asyncio.wait_for(again(), 30))
