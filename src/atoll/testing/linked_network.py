"""A link's phases over the simulated network: what they say may be late, lost or doubled, and die with either side.

The link itself is a stand-in that keeps what any link keeps: a node's part in a try is in its memory only, a node helps to
reveal one sum a round, and the server has on its disk who was in it before it asks for that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.messages import UPDATE, StartTraining
from atoll.node import events as node_events
from atoll.server import events
from atoll.testing.network import Federation
from atoll.testing.stored import RUN, made
from atoll.wire import Address

STEPS = events.Steps(("keys", "shares"), ("survivors", "unmask"))
_Try = tuple[int, int]


class LinkedFederation(Federation):
    """A run whose updates are added up under a link; see `Federation`.

    Attributes:
        revealed: round → the nodes of the sums that enough nodes helped to reveal: one a round, if all is well.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        self._joined: dict[str, tuple[int, _Try]] = {}
        self._given: dict[tuple[str, int], _Try] = {}
        self._asked: dict[_Try, frozenset[str]] = {}
        self._kept: tuple[_Try, tuple[str, ...]] | None = None
        self._trusted: frozenset[str] | None = None
        self.abandoned = 0
        super().__init__(*words, steps=STEPS, **options)

    def check(self) -> None:
        """See `Federation.check`; and no sum was made that its nodes didn't help to reveal, nor two of one round.

        Raises:
            AssertionError: it was.
        """
        super().check()
        for closed in self._store.closed:
            tried = closed.round, closed.attempt
            assert self._asked.get(tried) == frozenset(closed.accepted), (
                "a sum was closed of other nodes than those that revealed it"
            )
            helped = [node for node in closed.accepted if self._given.get((node, closed.round)) == tried]
            assert len(helped) >= self.plan.cohort.minimum, "a sum was made that too few nodes helped to reveal"

    # The server's link.

    def _past(self, past: events.Past) -> events.Past:
        self._trusted = None
        if self._kept and self._kept[0] == (past.closed + 1, past.attempt):
            self._trusted = frozenset(self._kept[1])
            return past._replace(summed=self._kept[1])
        return past

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
        self._tell_server(partial(events.Collected, phase=command.phase, nodes=nodes), life)

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
        given = self._given.get((key, task.round), tried)
        if phase == STEPS.before[0]:
            self._joined[key] = life, tried
        if given != tried or self._joined.get(key) != (life, tried):
            self._tell_node(key, partial(node_events.CannotTrain, task=task, reason="no part in this try"), life)
            return
        if phase == STEPS.last:
            self._given[key, task.round] = tried
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
