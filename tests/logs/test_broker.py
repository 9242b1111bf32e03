"""The local broker's own small parts."""

from __future__ import annotations

import json
import socket
import uuid

import pytest

from atoll.errors import LogError
from atoll.logs import broker


def test_a_clusters_id_never_reads_as_an_option(monkeypatch):
    """One random id in 64 begins with a dash; the storage tool took it for an option."""
    drawn = iter([uuid.UUID(bytes=bytes([0xF8] * 16)), uuid.UUID(bytes=bytes(16))])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    assert broker._cluster() == "A" * 22
    assert next(drawn, None) is None


def test_a_broker_comes_back_to_its_port_or_says_that_it_is_taken(tmp_path, monkeypatch):
    """It once took another without a word, where an outgoing connection had its own: all nodes waited for it in vain."""
    monkeypatch.setattr(broker, "_PORT_PATIENCE", 0.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        (tmp_path / "broker.json").write_text(json.dumps({"address": f"127.0.0.1:{port}", "controller": port, "pid": 1 << 30}))
        with pytest.raises(LogError, match=f"port {port} is taken: end what has it, or choose another --port"):
            broker._ports(tmp_path, None)
    assert broker._ports(tmp_path, None) == (port, port)
    assert all(one in broker._QUIET for one in broker._ports(tmp_path / "new", None))
