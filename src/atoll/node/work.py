"""A node's work for a run, from the bytes of a model to the sealed bytes of an update; knows no network."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from atoll import algorithms
from atoll.algorithms import Algorithm, Memory
from atoll.compression import Down, Press, parted
from atoll.keys import Identity
from atoll.learner import Data, Learner
from atoll.messages import EndSession, StartTraining
from atoll.node.download import received
from atoll.node.final import keep_final, keep_personal
from atoll.node.memory import Memories
from atoll.node.outbox import Outbox
from atoll.plan import Plan
from atoll.vector import Layouts, Update
from atoll.wire import Address, Buffer, encode, pack, seal

log = logging.getLogger("atoll.node")


@dataclass(frozen=True)
class Work:
    """What a node works with.

    Args:
        plan, algorithm, learner, press, down: what everyone agreed to.
        layouts: of what the server sends.
        data, name, identity, directory: the node's own.
        outbox, memories: where updates, and what goes with them, are kept.
    """

    plan: Plan
    algorithm: Algorithm
    learner: Learner
    press: Press
    down: Down
    layouts: Layouts
    data: Data
    name: str
    identity: Identity
    directory: Path
    outbox: Outbox
    memories: Memories

    def followed(self, before: Buffer, step: Buffer) -> list[memoryview]:
        """Return the bytes of the model that a step leads to; see `Down.followed`."""
        return self.down.followed(before, step, self.layouts)

    def train(self, task: StartTraining, body: Buffer) -> tuple[Memory, Update]:
        """Judge the received model and train it; return what the node remembers if the update counts, and that."""
        brief = received(body, self.layouts, self.down)
        before, left = parted(self.memories.recall(task.run, task.counted))
        memory, update = algorithms.work(self.plan, self.algorithm, self.learner, brief, before, self.data, task.round, self.name)
        small, left_now = self.press.encode(update.groups, left, task.round, self.name)
        if ((memory and not before) or (left_now and not left)) and task.counted:
            log.warning("round %d: what this node remembered of the run is gone; it begins anew", task.round)
        return {**memory, **left_now}, replace(update, groups=small)

    def seal(self, task: StartTraining, memory: Memory, update: Update) -> str:
        """Seal and keep an update that may leave, and what goes with it; return its digest."""
        parts = encode(update, task.model)
        address = Address(task.run, task.round, task.attempt, self.identity.node)
        envelope = seal(self.identity, address, self.plan.digest, parts)
        self.memories.keep(task.run, envelope.digest, memory, task.counted)
        self.outbox.keep(envelope, parts)
        return envelope.digest

    def keep_final(self, end: EndSession, body: Buffer) -> dict[str, float]:
        """Keep the final model, and what a personal method makes of it; return how that does on this node's rows."""
        brief = received(body, self.layouts, self.down)
        keep_final(self.directory, b"".join(pack(brief)) if self.down.small else body)
        memory, _ = parted(self.memories.recall(end.run, end.counted))
        about = (self.plan, self.algorithm, self.learner, brief, memory, self.data, self.plan.plan.rounds, self.name)
        mine = algorithms.own(*about)
        if self.algorithm.own:
            keep_personal(self.directory, mine)
        return dict(self.learner.evaluate(mine, self.data.judge))
