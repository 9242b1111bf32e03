"""The local broker's own small parts."""

from __future__ import annotations

import uuid

from atoll.logs import broker


def test_a_clusters_id_never_reads_as_an_option(monkeypatch):
    """One random id in 64 begins with a dash; the storage tool took it for an option."""
    drawn = iter([uuid.UUID(bytes=bytes([0xF8] * 16)), uuid.UUID(bytes=bytes(16))])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    assert broker._cluster() == "A" * 22
    assert next(drawn, None) is None
