"""What a node remembers outlives it: two versions on the disk, and the server's word which of them is right."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.errors import StoreError, WireError
from atoll.node.memory import Memories
from atoll.vector import Group, Layout, Tensor, layouts_of
from atoll.wire import pack, pack_whole, unpack_whole


def remembered(value: float) -> dict[str, Group]:
    layout = Layout((Tensor("dense/kernel", (2, 3)), Tensor("bias", (3,))))
    counts = Layout((Tensor("seen", ()),), "int64", "plain")
    return {
        "control": Group(layout, np.full(9, value, np.float32)),
        "counts": Group(counts, np.array([2**60 + 1])),
        "exact": Group(Layout((Tensor("x", (1,)),), "float64"), np.array([value], np.float64)),
    }


def test_a_file_says_its_own_layouts():
    groups = remembered(0.1)
    back = unpack_whole(b"".join(pack_whole(groups)))
    assert back == groups
    assert layouts_of(back) == layouts_of(groups)
    for spoilt in (b"", b"".join(pack_whole(groups))[:-1], b"".join(pack(groups))):
        with pytest.raises(WireError):
            unpack_whole(spoilt)


def test_the_server_says_which_version_is_right(tmp_path):
    memories = Memories(tmp_path)
    assert memories.recall("run", None) == {}
    memories.keep("run", "a" * 64, remembered(1), None)
    for counted, value in ((None, None), ("a" * 64, 1)):  # it was refused, or not judged yet; it counts
        again = Memories(tmp_path)  # as after a kill
        assert again.recall("run", counted) == (remembered(value) if value else {})
    memories.keep("run", "b" * 64, remembered(2), "a" * 64)
    assert memories.recall("run", "a" * 64) == remembered(1)
    assert memories.recall("run", "b" * 64) == remembered(2)
    memories.keep("run", "c" * 64, remembered(3), "a" * 64)  # the one before was refused
    assert memories.recall("run", "b" * 64) == {}
    assert len(list((tmp_path / "run").iterdir())) == 2
    assert memories.recall("other", "a" * 64) == {}
    memories.forget("run")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path):
    memories = Memories(tmp_path)
    memories.keep("run", "a" * 64, remembered(1), None)
    (path,) = (tmp_path / "run").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match=r"what this node remembered can't be read .*; move the file away to begin anew"):
        memories.recall("run", "a" * 64)


def test_nothing_is_written_where_nothing_is_remembered(tmp_path):
    Memories(tmp_path / "memory").keep("run", "a" * 64, {}, None)
    assert not (tmp_path / "memory").exists()
