"""A link's phases over the simulated network: what they say may be late, lost or doubled, and die with either side.

The link itself is a stand-in that keeps what any link keeps: a node's part in a try is in its memory only, a node helps to
reveal one sum a round, and the server has on its disk who was in it before it asks for that. With buckets a try is of several
sums; each stands or falls by itself, and one may fail even as it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from atoll.messages import UPDATE, StartTraining
from atoll.node import events as node_events
from atoll.server import events
from atoll.testing.network import Federation
from atoll.testing.stored import RUN, made
from atoll.wire import Address

STEPS = events.Steps(("keys", "shares"), ("survivors", "unmask"), gives="unmask")
SMALLEST, ENOUGH = 3, 3
"""Nodes in a sum, and buckets whose sums are made, at least."""
_SPOILT = 0.05
"""How often a bucket's nodes give what opens nothing."""
_Try = tuple[int, int]
_Bucket = frozenset[str]


class LinkedFederation(Federation):
    """A run whose updates are added up under a link, in one sum or in buckets of nodes; see `Federation`.

    Attributes:
        left_out: how many buckets were, in rounds that went on with the others.
        revealed: round → the nodes of the sums that enough nodes helped to reveal: one a round, if all is well.
    """

    def __init__(self, *words: Any, buckets: int = 0, **options: Any) -> None:
        self._count, self.left_out = buckets, 0
        self._drawn: dict[_Try, tuple[_Bucket, ...]] = {}
        self._left: dict[tuple[_Try, str], tuple[_Bucket, ...]] = {}
        self._joined: dict[str, tuple[int, _Try]] = {}
        self._given: dict[tuple[str, int], _Bucket] = {}
        self._helped: set[tuple[str, _Try]] = set()
        self._asked: dict[_Try, frozenset[str]] = {}
        self._kept: tuple[_Try, tuple[str, ...]] | None = None
        self._trusted: frozenset[str] | None = None
        self.abandoned = 0
        super().__init__(*words, steps=STEPS._replace(least=ENOUGH * SMALLEST if buckets else 0), **options)

    def check(self) -> None:
        """See `Federation.check`; and no sum was made that its nodes didn't help to reveal, nor two of one round.

        Raises:
            AssertionError: it was.
        """
        super().check()
        for closed in self._store.closed:
            tried, accepted = (closed.round, closed.attempt), frozenset(closed.accepted)
            sums = [some for some in self._in(tried, self._asked.get(tried, frozenset())) if some & accepted]
            assert frozenset().union(*sums) == accepted, "a sum was closed of other nodes than those that revealed it"
            for some in sums:
                helped = [node for node in some if (node, tried) in self._helped]
                assert len(helped) >= self._least, "a sum was made that too few nodes helped to reveal"

    @property
    def _least(self) -> int:
        """How few nodes reveal a sum: in a bucket of three, two."""
        return SMALLEST - 1 if self._count else self.plan.cohort.minimum

    def _in(self, tried: _Try, nodes: _Bucket) -> list[_Bucket]:
        """Return nodes by the sums that they are in."""
        return [bucket & nodes for bucket in self._drawn[tried]] if self._count else [nodes]

    # The server's link.

    def _past(self, past: events.Past) -> events.Past:
        self._trusted = None
        if not self._kept or self._kept[0][0] != past.closed + 1:
            return past
        if self._kept[0][1] != past.attempt:
            return past._replace(sealed=self._kept[1])
        self._trusted = frozenset(self._kept[1])
        return past._replace(summed=self._kept[1], sealed=self._kept[1])

    def _serve(self, commands: tuple[events.Command, ...]) -> None:
        for command in commands:
            match command:
                case events.Collect():
                    self._after_delay(partial(self._collect, command, self._server.life))
                case events.Say(phase, nodes):
                    state = self._server.state
                    if state is None:
                        return
                    key = (RUN, state.round, state.attempt)
                    for node in nodes:
                        self._to_node(node, partial(node_events.Said, key=key, phase=phase, body=phase.encode()))
                case _:
                    super()._serve((command,))

    def _collect(self, command: events.Collect, life: int) -> None:
        state, nodes = self._server.state, frozenset(command.nodes)
        if not self._server.up or self._server.life != life or state is None or not state.relay or not state.relay.collecting:
            return
        tried = state.round, state.attempt
        resumed = self._kept is not None and self._kept[0] == tried and self._trusted is not None
        if command.phase == UPDATE and resumed and nodes != self._trusted:
            self.abandoned += 1
            self._tell_server(partial(events.Abandoned, reason="another sum was about to be revealed"), life)
            return
        if command.phase == UPDATE:
            assert self._asked.setdefault(tried, nodes) == nodes, "two sums of one try are asked for"
        if command.phase == STEPS.after[-2]:
            self._kept = tried, tuple(sorted(self._asked[tried]))
        if not self._count:
            self._tell_server(partial(events.Collected, phase=command.phase, nodes=nodes), life)
            return
        left = self._left.setdefault((tried, command.phase), self._going_on(tried, command.phase, command.nodes))
        if len(left) < ENOUGH:
            self._tell_server(partial(events.Abandoned, reason="too few buckets are left"), life)
            return
        here = frozenset[str]().union(*left)
        lost = dict.fromkeys(nodes - here, "its bucket was left out")
        self._tell_server(partial(events.Collected, phase=command.phase, nodes=nodes & here, lost=lost), life)

    def _going_on(self, tried: _Try, phase: str, nodes: Sequence[str]) -> tuple[_Bucket, ...]:
        """Return the buckets of which enough nodes answered in a phase, and in those before."""
        if phase == STEPS.before[0]:
            count = min(self._count, len(nodes) // SMALLEST)
            self._drawn[tried] = tuple(frozenset(nodes[number::count]) for number in range(count))
            return self._drawn[tried]
        order = (*STEPS.before, UPDATE, *STEPS.after)
        before, here = self._left[tried, order[order.index(phase) - 1]], frozenset(nodes)
        least = self._least if phase in STEPS.after else SMALLEST
        return tuple(bucket for bucket in before if len(bucket & here) >= least)

    def _closed(self, command: events.Close, life: int, lost: Mapping[str, str] = {}) -> None:
        """Each bucket is opened that enough nodes helped to, and that none of them spoilt."""
        tried = command.round, command.attempt
        if not self._count or not self._server.up or self._server.life != life:
            super()._closed(command, life)
            return
        left = self._left[tried, STEPS.after[0]]
        helped = {node for node in command.accepted if (node, tried) in self._helped}
        opened = [one for one in left if len(one & helped) >= self._least and not self._world.happens(_SPOILT)]
        if len(opened) < ENOUGH:
            self._tell_server(partial(events.Abandoned, reason="too few buckets were opened"), life)
            return
        self.left_out += len(self._drawn[tried]) - len(opened)
        here = frozenset[str]().union(*opened)
        lost = {node: "its bucket was left out" for node in command.accepted if node not in here}
        counted = {node: digest for node, digest in command.accepted.items() if node in here}
        super()._closed(replace(command, accepted=counted), life, lost)

    # A node's link.

    def _act(self, key: str, commands: tuple[node_events.Command, ...]) -> None:
        for command in commands:
            match command:
                case node_events.Answer(task, phase):
                    self._after_delay(partial(self._answer, key, task, phase, self._nodes[key].life))
                case node_events.Protect(task):
                    self._after_delay(partial(self._protect, key, task, self._nodes[key].life))
                case _:
                    super()._act(key, (command,))

    def _answer(self, key: str, task: StartTraining, phase: str, life: int) -> None:
        node, tried = self._nodes[key], (task.round, task.attempt)
        if not node.up or node.life != life:
            return
        if phase == STEPS.before[0]:
            self._joined[key] = life, tried
        if self._joined.get(key) != (life, tried):
            self._tell_node(key, partial(node_events.CannotTrain, task=task, reason="no part in this try"), life)
            return
        if phase == STEPS.last:
            mine = next(some for some in self._in(tried, self._asked[tried]) if key in some)
            if self._given.setdefault((key, task.round), mine) != mine:
                self._tell_node(key, partial(node_events.CannotTrain, task=task, reason="another sum was revealed"), life)
                return
            self._helped.add((key, tried))
        self._to_server(
            key,
            partial(
                self._tell_server, partial(events.Answered, address=Address(RUN, *tried, key), phase=phase), self._server.life
            ),
        )

    def _trained(self, key: str, task: StartTraining, life: int) -> None:
        node = self._nodes[key]
        if not node.up or node.life != life or node.state.task is not task:
            return
        if (task.round, task.attempt) in node.outbox:
            super()._trained(key, task, life)
        elif not self._server.up or self._world.happens(self.faults.broken):  # the model can't be fetched
            self._tell_node(key, partial(node_events.Unanswered, task=task), life)
        else:
            node.trained += 1
            self._tell_node(key, partial(node_events.Fitted, task=task), life)

    def _protect(self, key: str, task: StartTraining, life: int) -> None:
        node, tried = self._nodes[key], (task.round, task.attempt)
        if not node.up or node.life != life:
            return
        if self._joined.get(key) != (life, tried):
            self._tell_node(key, partial(node_events.CannotTrain, task=task, reason="no part in this try"), life)
            return
        update = node.outbox.setdefault(tried, made(Address(RUN, *tried, key), task.model, task.counted))
        node.memories = {task.counted, update}
        self._tell_node(key, partial(node_events.Trained, task=task, digest=update), life)
