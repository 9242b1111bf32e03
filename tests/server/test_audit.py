"""`atoll audit`: whatever is altered, cut, forked or written anew is found, by the store itself or by one node's ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.federation import clients, plan, run

from atoll.chain import Chain, read
from atoll.errors import AtollError, AuditError, StoreError
from atoll.keys import Identity
from atoll.messages import Decline, StartTraining
from atoll.node.runtime import Node
from atoll.server.audit import Audited, verify
from atoll.server.book import NOISE, Book
from atoll.server.entries import rows_digest
from atoll.server.events import Judge
from atoll.server.patience import Patience
from atoll.server.runtime import Server
from atoll.store import RoundRow, RunRow, UpdateRow
from atoll.store.sql import SqlStore
from atoll.wire import Address

ROUNDS = 4


class Reluctant(Node):
    """A node that declines in its second round."""

    async def start_training(self, task: StartTraining) -> None:
        if task.round == 2:
            await self.channel.say(Decline(run=task.run, round=2, attempt=task.attempt, reason="[red]not today"))
        else:
            await super().start_training(task)


def stopped(place: Path) -> None:
    """A run of four nodes that is stopped after two rounds."""
    agreed = plan(plan={"rounds": ROUNDS})

    async def together() -> None:
        server = Server(agreed, store=place / "store", port=0, watch=lambda event: event.get("round") == 3 and server.stop())
        kinds = {"node-3": Reluctant}
        nodes = [kinds.get(name, Node)(server.url, one, name=name, directory=place / name) for name, one in clients(4).items()]
        await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))

    asyncio.run(asyncio.wait_for(together(), 60))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two places where the same stopped run went on, each with a store of the same key: a fork."""
    first = tmp_path_factory.mktemp("audit") / "first"
    stopped(first)
    second = first.with_name("second")
    shutil.copytree(first, second)
    for place in (first, second):
        run(plan(plan={"rounds": ROUNDS}), clients(4), place, resume=True)
    return first, second


@pytest.fixture
def place(runs, tmp_path):
    return Path(shutil.copytree(runs[0], tmp_path / "place"))


def audited(place: Path, *ledgers: Path) -> Audited:
    store = SqlStore(place / "store")
    try:
        return verify(place / "store", store, store.find(), ledgers)
    finally:
        store.close()


@contextlib.contextmanager
def base(place: Path) -> Iterator[sqlite3.Connection]:
    opened = sqlite3.connect(place / "store" / "atoll.sqlite")
    try:
        yield opened
        opened.commit()
    finally:
        opened.close()


def atoll(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "atoll", *map(str, words)], check=False, capture_output=True, text=True)


def test_a_run_that_was_stopped_and_went_on_has_one_record(place):
    names = [place / name for name in clients(4)]
    found = audited(place, *names)
    assert (found.rounds, found.nodes, found.ledgers) == (ROUNDS, 4, 4)
    shown = json.loads(atoll("audit", "show", "--store", place / "store", "--json").stdout)
    whats = [one["entry"]["what"] for one in shown["record"]]
    assert (whats[0], whats[-1], whats.count("admitted"), whats.count("ended")) == ("begun", "ended", 4, 2)
    assert whats.count("opened") >= whats.count("closed") == ROUNDS
    assert [one["number"] for one in shown["record"]] == list(range(1, found.entries + 1))
    for_people = atoll("audit", "show", "--store", place / "store").stdout
    assert "node-3: declined: [red]not today" in for_people
    assert len(for_people.splitlines()) == found.entries + 1
    done = atoll("audit", "verify", "--store", place / "store", "--ledger", names[0], "--ledger", names[1])
    assert f"all {found.entries} entries are whole and signed by key {shown['key']}" in done.stdout
    assert "heads in 2 ledgers are its own" in done.stdout
    assert json.loads(atoll("audit", "verify", "--store", place / "store", "--json").stdout)["entries"] == found.entries


def test_an_alteration_is_one_line_and_exit_code_2(place):
    with base(place) as store:
        store.execute("UPDATE record SET entry = replace(entry, 'node-1', 'node-9')")
    for words in (["verify"], ["show"]):
        done = atoll("audit", *words, "--store", place / "store")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert re.search(r"entry \d+ was altered: its hash isn't the head that is stored with it", done.stderr)
    done = atoll("audit", "verify", "--store", place / "store", "--ledger", place / "store")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.fixture(scope="module")
def altered(runs, tmp_path_factory):
    """A store to alter and to mend again, and its reader."""
    place = Path(shutil.copytree(runs[0], tmp_path_factory.mktemp("altered") / "place"))
    store = SqlStore(place / "store")
    yield place, store
    store.close()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_changed_byte_of_any_entry_is_found(altered, data):
    place, store = altered
    with base(place) as raw:
        rows = raw.execute("SELECT number, entry, head, signature FROM record ORDER BY number").fetchall()
    number, *cells = data.draw(st.sampled_from(rows))
    column, before = data.draw(st.sampled_from(list(zip(("entry", "head", "signature"), cells))))
    at, byte = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 126))
    after = before[:at] + chr(byte) + before[at + 1 :]
    if after == before:
        return
    change = f"UPDATE record SET {column} = ? WHERE number = ?"
    with base(place) as raw:
        raw.execute(change, (after, number))
    with pytest.raises(AuditError, match=f"entry {number}[ :]"):
        verify(place / "store", store, store.find())
    with base(place) as raw:
        raw.execute(change, (before, number))
    verify(place / "store", store, store.find())


UNTOLD = {
    "runs": {"started", "ended", "log_start", "pruned"},
    "nodes": {"first_seen", "last_seen"},
    "updates": {"id"},
    "rounds": set(),
}
"""What the record doesn't tell: when a run and its nodes were seen, and what is the store's own."""

ONLY_ACCEPTED = {"seconds", "weight", "position", "place", "metrics", "folded", "cosine"}
"""What a refused update has no facts of."""


@pytest.mark.parametrize("table", UNTOLD)
def test_one_changed_cell_of_the_history_is_found(altered, table):
    place, store = altered
    name = store.find().run
    with base(place) as raw:
        found = raw.execute(f"SELECT rowid, * FROM {table}")
        columns = [one[0] for one in found.description][1:]
        rows = found.fetchall()
    assert rows
    for number, *cells in rows:
        for column, before in zip(columns, cells):
            if column in UNTOLD[table] or (table, column) == ("runs", "run"):
                continue
            if table == "updates" and cells[columns.index("status")] != "accepted" and column in ONLY_ACCEPTED:
                continue
            after = before + 100 if isinstance(before, int | float) else other(str(before))
            with base(place) as raw:
                raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (after, number))
            with pytest.raises(AtollError):
                verify(place / "store", store, store.find(name))
            with base(place) as raw:
                raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (before, number))
    verify(place / "store", store, store.find(name))


def other(text: str) -> str:
    """A text with one digit or letter changed, so that JSON stays JSON."""
    at = next((at for at, sign in enumerate(text) if sign in "0123456789"), len(text) - 1)
    return text[:at] + ("2" if text[at : at + 1] == "1" else "1") + text[at + 1 :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM record", "it has no record"),
        ("DELETE FROM record WHERE number > 5", r"stored, but the record doesn't know it: the record was cut"),
        ("DELETE FROM record WHERE number = (SELECT max(number) FROM record)", "the record doesn't end so"),
        ("DELETE FROM record WHERE number = 6", "entry 6 is missing: number 7 stands in its place"),
        ("DELETE FROM rounds WHERE round = 2", "round 2 is in the record, but not in the store"),
        ("DELETE FROM updates WHERE status = 'declined'", r"was declined .* is missing or altered in the store"),
        ("DELETE FROM nodes WHERE name = 'node-1'", "that it was admitted at all"),
        ("INSERT INTO nodes SELECT run, 'ff', 'eve', key, 0, 0 FROM nodes LIMIT 1", "node ff: its name or key"),
        ("UPDATE record SET number = 1 - number WHERE number IN (6, 7); UPDATE record SET number = 12 + number WHERE number < 0",
         "entry 6 was altered"),
    ],
)  # fmt: skip
def test_what_was_cut_added_or_moved_is_found(place, change, said):
    with base(place) as store:
        store.executescript(change)
    with pytest.raises(AuditError, match=said):
        audited(place)


def test_a_record_and_a_store_cut_alike_contradict_a_ledger(place):
    with base(place) as store:
        (run_, last) = store.execute("SELECT run, max(number) FROM record").fetchone()
        told = [json.loads(entry) for (entry,) in store.execute("SELECT entry FROM record ORDER BY number")]
        closing = max(number for number, one in enumerate(told, 1) if one["what"] == "closed")
        opening = max(number for number, one in enumerate(told, 1) if one["what"] == "opened" and number < closing)
        before = max(one["round"] for one in told[: opening - 1] if one["what"] == "closed")
        opened = [one for one in told[: opening - 1] if one["what"] == "opened"][-1]
        store.execute("DELETE FROM record WHERE number >= ?", (opening,))
        store.execute("DELETE FROM rounds WHERE round > ?", (before,))
        store.execute("DELETE FROM updates WHERE round > ?", (before,))
        now = json.dumps({name: opened[name] for name in ("round", "attempt", "cohort")})
        store.execute("UPDATE runs SET outcome = 'running', reason = '', opened = ? WHERE run = ?", (now, run_))
    audited(place)
    with pytest.raises(AuditError, match=rf"the record was cut: it ends with entry {opening - 1}, the node was shown entry \d+"):
        audited(place, place / "node-0")
    assert last > opening


def test_a_fork_contradicts_the_ledger_of_whoever_saw_the_other_branch(runs):
    first, second = runs
    assert audited(first, first / "node-0").key == audited(second, second / "node-1").key
    for store, ledger in ((first, second / "node-1"), (second, first / "node-0")):
        with pytest.raises(AuditError, match="the record was rewritten, or is a fork: up to entry"):
            audited(store, ledger)


def rewrite(place: Path, was: str, now: str) -> None:
    """What a server could do: alter its history, and write and sign the whole record anew."""
    store = SqlStore(place / "store")
    row = store.find()
    identity = Identity.at(place / "store" / "server.key")
    chain, links = Chain(identity, row.run, row.plan_digest), []
    for link in store.links(row.run):
        chain.last = chain.next(json.loads(link.entry.replace(was, now)))
        links.append(chain.last)
    store.close()
    with base(place) as raw:
        raw.execute("UPDATE nodes SET name = replace(name, ?, ?)", (was, now))
        for link in links:
            new = (link.entry, link.head, link.signature, link.number)
            raw.execute("UPDATE record SET entry = ?, head = ?, signature = ? WHERE number = ?", new)


def test_a_server_that_writes_its_record_anew_is_caught_by_one_ledger(place):
    rewrite(place, "node-3", "nobody")
    audited(place)  # all by itself it is whole
    with pytest.raises(AuditError, match="node-1: the record was rewritten, or is a fork"):
        audited(place, place / "node-1")


def test_a_record_by_another_key_is_found(place):
    old = (place / "store" / "server.key").read_bytes()
    (place / "store" / "server.key").unlink()
    rewrite(place, (Identity.at(place / "store" / "server.key").public).hex(), "")  # a new key is made; nothing is replaced
    with pytest.raises(AuditError):
        audited(place)
    (place / "store" / "server.key").write_bytes(old)
    with pytest.raises(AuditError, match="the signature isn't that of key"):
        audited(place)


def test_what_a_ledger_says_otherwise_is_found(place):
    ledger = sqlite3.connect(place / "node-0" / "ledger.sqlite")
    audited(place, place / "node-0")
    for change, back, said in (
        ("UPDATE ledger SET verdict = 'refused' WHERE round = 2", "UPDATE ledger SET verdict = 'accepted' WHERE round = 2",
         "round 2: the node was told that its update .* is refused, the record says otherwise"),
        ("UPDATE ledger SET round = 9 WHERE round = 2", "UPDATE ledger SET round = 2 WHERE round = 9", "round [29]: "),
        ("UPDATE heads SET number = 900 WHERE id = 2", "UPDATE heads SET number = 6 WHERE id = 2",
         "the ledger's head of entry 900 was altered"),
    ):  # fmt: skip
        ledger.execute(change)
        ledger.commit()
        with pytest.raises(AuditError, match=said):
            audited(place, place / "node-0")
        ledger.execute(back)
        ledger.commit()
    ledger.execute("DELETE FROM heads")
    ledger.commit()
    with pytest.raises(AtollError, match="its ledger holds no head of run"):
        audited(place, place / "node-0")
    ledger.close()
    with pytest.raises(AtollError, match="no ledger is there"):
        audited(place, place / "nowhere")


def test_a_run_goes_on_only_with_its_record_and_its_key(tmp_path):
    stopped(tmp_path)
    agreed = plan(plan={"rounds": ROUNDS})
    key = (tmp_path / "store" / "server.key").read_bytes()
    (tmp_path / "store" / "server.key").unlink()
    with pytest.raises(StoreError, match=r"its record is signed by key \w{12}, but server.key is another: put that one back"):
        Server(agreed, store=tmp_path / "store", port=0, resume=True)
    (tmp_path / "store" / "server.key").write_bytes(key)
    with base(tmp_path) as store:
        store.execute("UPDATE record SET entry = 'x' WHERE number = 4")
    with pytest.raises(AuditError, match="entry 4 was altered"):
        Server(agreed, store=tmp_path / "store", port=0, resume=True)
    with base(tmp_path) as store:  # as a run of before there were records
        store.execute("DELETE FROM record")
    for name in clients(4):
        with sqlite3.connect(tmp_path / name / "ledger.sqlite") as ledger:
            ledger.execute("DELETE FROM heads")
            ledger.execute("UPDATE ledger SET verdict = NULL")
    run(agreed, clients(4), tmp_path, resume=True)
    found = audited(tmp_path, tmp_path / "node-2")
    assert (found.rounds, found.nodes) == (ROUNDS - 2, 4)


def test_what_could_not_be_stored_is_in_no_head():
    """The record goes on from what is durable: a head that nodes were told of is never lost."""
    store, identity = SqlStore(), Identity.new()
    book = Book(store, Chain(identity, "r", "p"), "r", Patience(0.0, print))
    book.begins(RunRow("r", "name", "p", "{}", 0.0, "m"))
    before = book.head
    store._base.begin, working = None, store._base.begin  # type: ignore[assignment]
    with pytest.raises(TypeError):
        asyncio.run(book.opened(1, 1, ["n"]))
    assert book.head == before
    store._base.begin = working  # type: ignore[method-assign]
    asyncio.run(book.opened(1, 1, ["n"]))
    assert book.head.number == before.number + 1
    assert [one["what"] for one in read(store.links("r"), "r", "p")] == ["begun", "opened"]
    book.close()
    store.close()


def test_a_refusal_that_could_not_be_stored_is_stored_when_it_comes_again():
    store = SqlStore()
    book = Book(store, Chain(Identity.new(), "r", "p"), "r", Patience(0.0, print))
    book.begins(RunRow("r", "name", "p", "{}", 0.0, "m"))
    judged = Judge(Address("r", 1, 1, "ab"), "d" * 64, False, "it holds NaN", 100, None, offence=True)
    store._base.begin, working = None, store._base.begin  # type: ignore[assignment]
    with pytest.raises(TypeError):
        asyncio.run(book.refused("rejected", judged))
    store._base.begin = working  # type: ignore[method-assign]
    for _ in range(2):
        asyncio.run(book.refused("rejected", judged))
    (row,) = store.updates("r")
    assert (row.status, row.reason, row.bytes, row.offence) == ("rejected", "it holds NaN", 100, True)
    (entry,) = [one for one in read(store.links("r"), "r", "p") if one["what"] == "refused"]
    assert entry["offence"] is True
    book.close()
    store.close()


def test_a_node_cannot_fill_the_store_with_updates_for_rounds_that_are_not():
    store = SqlStore()
    book = Book(store, Chain(Identity.new(), "r", "p"), "r", Patience(0.0, print))
    book.begins(RunRow("r", "name", "p", "{}", 0.0, "m"))

    async def noise(round_: int) -> None:
        book.opens(round_, 1, [], 0.0)
        for k in range(3 * NOISE):
            await book.refused("late", Judge(Address("r", 1000 + k, round_, "ab"), "d" * 64, False, "too early"))
        await book.refused("late", Judge(Address("r", 1000, 1, "cd"), f"{round_:064}", False, "too early"))
        await book.refused("rejected", Judge(Address("r", round_, 1, "ab"), "e" * 64, False, "it holds NaN", offence=True))

    asyncio.run(noise(1))
    asyncio.run(noise(2))
    rows = store.updates("r")
    assert Counter(row.node for row in rows) == {"ab": 2 * (NOISE + 1), "cd": 2}
    assert [row.round for row in rows if row.offence] == [1, 2]
    book.close()
    store.close()


def test_a_column_that_came_later_changes_no_older_record():
    """The digest is what rounds had that knew of no `fetched`."""
    row = RoundRow("run", 1, 1, 10.0, 2.0, "model", "state", 3, 1, 100, 3)
    update = UpdateRow("run", 1, 1, "node", "accepted", "digest", 100, 1.0, 40.0, "", "0", 0, {"samples": 40.0})
    assert rows_digest(row, [update]) == "6b013e58eb9be8ab564cbd5197fcf96a2dafbdb42284b7be7a08701d02eeb5c9"
