"""The server's end of the log that a plan names: its own, or Kafka; and of that where sums come which nodes opened."""

from __future__ import annotations

from pathlib import Path

from atoll.logs import Reader
from atoll.logs.access import Access
from atoll.logs.embedded import EmbeddedLog, Room
from atoll.plan import Plan
from atoll.server import transcript
from atoll.server.agreed import Agreed
from atoll.server.resume import Unfinished


def open_log(
    plan: Plan, directory: Path, run: str, size: int, room: Room, left: Unfinished | None, access: Access
) -> EmbeddedLog | Reader:
    """Open the log.

    Args:
        plan: what names it.
        directory: where updates are kept.
        run: the run whose updates come.
        size: of an update's numbers, in bytes.
        room: asked before a body is taken in.
        left: what another server left of the run, if that is so.
        access: by what Kafka knows this server.

    Raises:
        RefusedError, LogError: it can't be had.
    """
    limit = int(1.01 * size) + (1 << 20)
    if plan.log.kafka is None:
        return EmbeddedLog(directory, run, limit, room)
    from atoll.logs.kafka import KafkaReader  # an optional part

    start = left.row.log_start if left else None
    over = (left.past.closed, left.open) if left else (0, ())
    topic, apart = plan.log.topic, plan.log.apart
    reader = KafkaReader(plan.log.kafka, topic, run, directory, limit, start, over, access=access, apart=apart)
    for node in left.past.names if left else ():
        reader.follow(node)
    return reader


def open_sums(agreed: Agreed, directory: Path, run: str, room: Room) -> EmbeddedLog | None:
    """Open where sums come that nodes opened, in a store's directory; None where the plan has nodes open none."""
    if not agreed.link or not agreed.link.opens:
        return None
    return EmbeddedLog(directory / transcript.PLACE, run, 2 * agreed.opened_size + (1 << 20), room)
