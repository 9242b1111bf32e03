"""What a node makes ready once it knows its plan, before anything is promised to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from atoll import algorithms, compression, learners, method
from atoll.algorithms import Algorithm
from atoll.keys import Identity
from atoll.learner import Data, Learner
from atoll.node.linked import Linked
from atoll.node.memory import Memories
from atoll.node.outbox import Outbox
from atoll.node.rows import Holding
from atoll.node.work import Work
from atoll.plan import Plan
from atoll.privacy import choose as privacy
from atoll.store.ledger import Ledger
from atoll.vector import layouts_of


class Own(NamedTuple):
    """What a node brings.

    Args:
        learner: one of its owner's, in place of the one that the plan names.
        allow: functions that a plan may name here.
        roster: returns the only nodes that its owner lets be in a sum.
        holding: its rows.
        name, identity, directory, ledger, outbox, memories: the node's.
    """

    learner: Learner | None
    allow: Collection[str]
    roster: Callable[[], Collection[str] | None]
    holding: Holding
    name: str
    identity: Identity
    directory: Path
    ledger: Ledger
    outbox: Outbox
    memories: Memories


class Ready(NamedTuple):
    """What comes of it under a plan; `linked` is None where the plan has no link."""

    learner: Learner
    algorithm: Algorithm
    linked: Linked | None
    data: Data
    work: Work


async def ready(plan: Plan, own: Own) -> Ready:
    """Return what a node needs to take part in a plan.

    Raises:
        AtollError: the plan can't be carried out here, or the data doesn't fit it.
        GaveUpError: reading was stopped.
    """
    learner = own.learner if own.learner is not None else await asyncio.to_thread(learners.build, plan, own.allow)
    algorithm = method.find(plan, learner)
    updates = algorithm.updates(learner.layouts)
    press = compression.find(plan, updates, sums=algorithms.adds(algorithm))
    updates = press.layouts(updates)
    link = privacy.link(plan, updates)
    await asyncio.to_thread(privacy.prepare, plan)
    linked = Linked(link, plan, own.identity, own.ledger, link.updates(updates), own.roster) if link else None
    data = await own.holding.ready(plan)
    layouts = layouts_of(algorithm.brief(algorithm.init(learner.initial(0))))
    mine = data, own.name, own.identity, own.directory, own.outbox, own.memories
    work = Work(plan, algorithm, learner, press, compression.down(plan, learner.layouts), layouts, *mine)
    return Ready(learner, algorithm, linked, data, work)
