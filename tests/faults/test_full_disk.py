"""Disks that are full or have gone read-only: one line says so, nothing is corrupted, and the run goes on after the mend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from tests.federation import clients, plan, run

from atoll.errors import GaveUpError
from atoll.node.runtime import Node
from atoll.server.audit import verify
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store.sql import SqlStore

Switch = Callable[[bool], None]
"""Breaks something, or mends it."""
ROUNDS = 3
AGREED = plan(cohort={"quorum": 1.0})


READ_ONLY = "PRAGMA query_only=1", "PRAGMA query_only=0"
FULL = "PRAGMA max_page_count=1", "PRAGMA max_page_count=1000000"


def database(base: Any, pragmas: tuple[str, str] = READ_ONLY) -> Switch:
    """A SQLite database that refuses to be written, with SQLite's own words, while it is broken."""
    broken = [False]
    event.listen(base._engine, "checkout", lambda connection, *_: connection.execute(pragmas[not broken[0]]))
    return lambda now: broken.__setitem__(0, now)


def directory(path: Path) -> Switch:
    """A directory where nothing can be made while it is broken: a file stands in its place."""
    aside = path.with_name(f"{path.name}.aside")

    def switch(broken: bool) -> None:
        if broken:
            path.rename(aside)
            path.touch()
        else:
            path.unlink()
            aside.rename(path)

    return switch


def full_file(owner: Any) -> Switch:
    """An open file that stands on a full disk while it is broken."""
    own = owner._file

    def switch(broken: bool) -> None:
        if broken:
            owner._file = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
        else:
            owner._file.close()
            owner._file = own

    return switch


BREAKS: dict[str, tuple[str, Callable[[Any], Switch], str]] = {
    "history, at the close": ("close", lambda server: database(server.store._base), "readonly database"),
    "no page left, at the close": ("close", lambda server: database(server.store._base, FULL), "full"),
    "model": ("close", lambda server: directory(server.models.directory), "the model can't be stored (Not a directory)"),
    "history, at the opening": ("open", lambda server: database(server.store._base), "readonly database"),
    "index of the log": ("asked", lambda server: full_file(server.log._index), "index.jsonl: can't be written"),
}
WORDS = {"ledger": "readonly database", "outbox": "the update can't be kept", "model": "the model can't be kept"}


@pytest.mark.parametrize("name", BREAKS)
def test_a_server_waits_says_why_and_goes_on(tmp_path, name):
    moment, make, words = BREAKS[name]
    said: list[str] = []

    class Breaking(Server):
        def aggregate(self, command: Any) -> Any:
            if moment == "close" and command.round == 2 and not said:
                switch(True)
            return super().aggregate(command)

    def mend() -> None:
        if (found := server.status())["store_waiting"] or found["log_waiting"]:
            said.append(found["waiting_for"])
            switch(False)
        else:
            asyncio.get_running_loop().call_later(0.01, mend)

    def watch(told: Any) -> None:
        happened = told["what"], told.get("round")
        if (moment, *happened) in (("open", "round", 1), ("asked", "asked", 2)):
            switch(True)
        if happened == ("round", 1):
            mend()

    server = Breaking(AGREED, store=tmp_path / "store", port=0, watch=watch)
    switch = make(server)

    async def together() -> dict[str, Any]:
        nodes = [Node(server.url, one, name=who, directory=tmp_path / who) for who, one in clients().items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert len(said) == 1
    assert words in said[0]
    assert said[0].startswith("round 2: ")
    assert history["outcome"] == "completed"
    assert history["last"] == simulate(AGREED, clients()).digest
    assert not [one for row in history["rounds"] for one in row["refused"]]
    store = SqlStore(tmp_path / "store")
    found = verify(tmp_path / "store", store, store.find(), [tmp_path / who for who in clients()])
    assert (found.rounds, found.ledgers) == (ROUNDS, 3)


def test_a_store_that_nobody_mends_ends_the_run_in_order(tmp_path):
    """At the deadline the server gives up, with the reason; what was done is there, and another one goes on."""
    agreed = plan(cohort={"quorum": 1.0, "deadline": 2})
    gone: list[BaseException] = []

    class Breaking(Server):
        def aggregate(self, command: Any) -> Any:
            if command.round == 2:
                switch(True)
            return super().aggregate(command)

    server = Breaking(agreed, store=tmp_path / "store", port=0)
    switch = database(server.store._base)

    async def together() -> None:
        nodes = [Node(server.url, one, name=who, directory=tmp_path / who) for who, one in clients().items()]
        ended = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True)
        gone.extend(one for one in ended if isinstance(one, BaseException))

    asyncio.run(asyncio.wait_for(together(), 60))
    assert {type(one) for one in gone} == {GaveUpError}
    assert "round 2 can't be closed" in str(gone[0])
    assert "readonly database" in str(gone[0])
    switch(False)
    assert len(SqlStore(tmp_path / "store").rounds(server.run)) == 1
    history = run(agreed, clients(), tmp_path, resume=True)
    assert history["run"] == server.run
    assert history["last"] == simulate(agreed, clients()).digest


def test_who_stops_a_server_that_waits_for_room_need_not_wait(tmp_path):
    """The deadline is ten minutes away."""
    agreed = plan(cohort={"quorum": 1.0, "deadline": 600})

    class Breaking(Server):
        def aggregate(self, command: Any) -> Any:
            switch(True)
            return super().aggregate(command)

    def watch(told: Any) -> None:
        if told["what"] == "waiting":
            server.stop()

    server = Breaking(agreed, store=tmp_path / "store", port=0, watch=watch)
    switch = database(server.store._base)

    async def together() -> list[BaseException | Any]:
        nodes = [Node(server.url, one, name=who, directory=tmp_path / who) for who, one in clients().items()]
        return await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True)

    ended, *_ = asyncio.run(asyncio.wait_for(together(), 40))
    assert isinstance(ended, GaveUpError)
    assert "readonly database" in str(ended)


@pytest.mark.parametrize("what", WORDS)
def test_a_node_waits_says_why_and_goes_on(tmp_path, what):
    said: list[str] = []

    async def together() -> dict[str, Any]:
        server = Server(AGREED, store=tmp_path / "store", port=0)

        def watch(told: Any) -> None:
            if told["what"] == "verdict" and told["round"] == 1:
                switch(True)
            if told["what"] == "waiting":
                said.append(told["reason"])
                switch(False)

        nodes = [
            Node(server.url, one, name=who, directory=tmp_path / who, watch=watch if who == "node-1" else None)
            for who, one in clients().items()
        ]
        home = tmp_path / "node-1"
        switch = database(nodes[1].ledger._base) if what == "ledger" else directory(home / what)
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert len(said) == 1
    assert WORDS[what] in said[0]
    assert all(len(row["answered"]) == 3 and not row["refused"] for row in history["rounds"])
    assert history["last"] == simulate(AGREED, clients()).digest
