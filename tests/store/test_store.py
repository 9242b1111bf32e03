"""The history in memory and on disk; models by digest; the node's ledger; and what is wrong with a place."""

from __future__ import annotations

import hashlib
import sqlite3

import numpy as np
import pytest
from safetensors.numpy import load_file

from atoll.errors import LayoutError, StoreError
from atoll.keys import Identity
from atoll.store.database import SCHEMA
from atoll.store.ledger import Ledger
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.testing import check_store
from atoll.vector import Group, Layout, Tensor, layouts_of
from atoll.wire import Address, seal


def test_in_memory():
    store = SqlStore()
    check_store(store)
    store.close()


def test_on_disk_and_read_beside_the_writer(tmp_path):
    store, reader = SqlStore(tmp_path), SqlStore(tmp_path)
    check_store(store)
    assert reader.history("r1") == store.history("r1")
    mode = sqlite3.connect(tmp_path / "atoll.sqlite")
    assert mode.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    mode.close()
    store.close()
    reader.close()


def test_a_newer_schema_is_not_touched(tmp_path):
    SqlStore(tmp_path).close()
    base = sqlite3.connect(tmp_path / "atoll.sqlite")
    base.execute("UPDATE schema SET version = 99")
    base.commit()
    base.close()
    with pytest.raises(StoreError, match=rf"made by a newer Atoll \(schema 99, this one knows {SCHEMA}\); upgrade Atoll"):
        SqlStore(tmp_path)


def test_places_that_are_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be a store"):
        SqlStore(tmp_path / "file")
    (tmp_path / "atoll.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(StoreError, match="the store failed") as caught:
        SqlStore(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="models can't be stored there"):
        Models(tmp_path / "file" / "models")


def groups(seed: int = 0):
    layout = Layout((Tensor("kernel", (3, 4)), Tensor("bias", (4,))))
    exact = Layout((Tensor("count", (2,)),), "float64")
    rng = np.random.default_rng(seed)
    return {
        "parameters": Group(layout, rng.random(16, np.float32)),
        "buffers": Group(exact, rng.random(2)),
    }


def test_a_model_is_known_by_its_bytes_and_readable_by_safetensors(tmp_path):
    models = Models(tmp_path)
    digest = models.put(groups())
    assert models.put(groups()) == digest
    path = models.path(digest)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert [file.name for file in tmp_path.iterdir()] == [f"{digest}.safetensors"]
    found = models.get(digest, layouts_of(groups()))
    assert all(found[name] == group for name, group in groups().items())
    np.testing.assert_array_equal(load_file(path)["parameters/kernel"], groups()["parameters"].arrays["kernel"])
    with pytest.raises(LayoutError):
        models.get(digest, {"parameters": groups()["parameters"].layout})


@pytest.mark.parametrize("digest", ["0" * 64, "../secret", "", "\U00020000" * 64])
def test_a_model_that_is_not_there(tmp_path, digest):
    with pytest.raises(StoreError, match="there is no model"):
        Models(tmp_path).path(digest)
    assert Models(tmp_path).step(digest, digest) is None


def test_the_ledger_says_what_left_before_what_became_of_it(tmp_path):
    identity = Identity.new()
    envelope = seal(identity, Address("r", 1, 1, identity.node), "p" * 64, [b"body"])
    ledger = Ledger(tmp_path)
    ledger.leaving(envelope, 10.0)
    (entry,) = ledger.entries()
    assert (entry["digest"], entry["bytes"], entry["plan"], entry["guard"]) == (envelope.digest, 4, "p" * 64, "none")
    assert entry["verdict"] is None
    ledger.judged(envelope.digest, accepted=False, reason="too late", now=11.0)
    (entry,) = ledger.entries()
    assert (entry["verdict"], entry["reason"]) == ("refused", "too late")
    ledger.close()


def test_an_older_ledger_gets_the_index_by_which_verdicts_are_noted(tmp_path):
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as base:
        base.execute("DROP INDEX ledger_by_digest")
        base.execute("UPDATE schema SET version = 3")
    ledger = Ledger(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as base:
        (*_, how) = base.execute("EXPLAIN QUERY PLAN UPDATE ledger SET verdict = 'x' WHERE digest = 'd'").fetchone()
    assert "USING INDEX ledger_by_digest" in how
    ledger.close()
