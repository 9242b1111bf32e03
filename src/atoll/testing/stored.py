"""What the server of a simulated world has on disk, and what must hold of it whatever happens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atoll.server import events
from atoll.server.offences import Conduct
from atoll.server.resume import still_open
from atoll.stopping import Course
from atoll.wire import Address

RUN = "run"


@dataclass
class Stored:
    """A store: it outlives the server.

    Args:
        models: the initial one and those that rounds made, each a digest of all that went into it.
        names: node → name.
        closed: the rounds.
        opened: the round that was last begun, as `RunRow.opened`.
        refused: what doesn't count.
    """

    models: list[str] = field(default_factory=lambda: [digest("initial")])
    names: dict[str, str] = field(default_factory=dict)
    closed: list[events.Close] = field(default_factory=list)
    opened: Mapping[str, Any] = field(default_factory=dict)
    refused: set[Address] = field(default_factory=set)

    @property
    def model(self) -> str:
        """The newest."""
        return self.models[-1]

    def opens(self, command: events.Train) -> None:
        """A round begins."""
        late = {node: task[:2] for node, task in command.late.items()}
        self.opened = {"round": command.round, "attempt": command.attempt, "cohort": command.nodes, "late": late}

    def closes(self, command: events.Close) -> None:
        """A round is closed, in one step."""
        assert command.round == len(self.closed) + 1, "rounds are closed one after the other"
        self.models.append(folded(self.model, command.round, self.updates(command)))
        self.closed.append(command)

    def updates(self, closed: events.Close) -> list[tuple[Address, str]]:
        """Return a round's accepted updates, as the store's rows have them."""
        return [(closed.address(RUN, node), digest) for node, digest in closed.accepted.items()]

    def last(self) -> list[tuple[Address, str]]:
        """Return the accepted updates of the last closed round."""
        return self.updates(self.closed[-1]) if self.closed else []

    def counted(self, node: str) -> str | None:
        """Return a node's last update that counts."""
        return next((one.accepted[node] for one in reversed(self.closed) if node in one.accepted), None)

    def past(self, conduct: Conduct) -> events.Past:
        """Return what another server has to know."""
        closed = len(self.closed)
        decided = {address for one in self.closed for address, _ in self.updates(one)}
        decided |= {address for address in self.refused if address.round <= closed}
        return events.Past(
            closed=closed,
            attempt=self.opened["attempt"] if self.opened.get("round") == closed + 1 else 1,
            tasks=still_open(RUN, self.opened, self.models, decided),
            names=dict(self.names),
            model=self.model,
            course=Course(),
            answered=tuple(address.node for address, _ in self.last()),
            conduct=conduct,
        )

    def check(self, log: Mapping[Address, str], minimum: int, *, late: bool) -> set[str]:
        """Check what must hold at any time; return the digests of all updates that count.

        Raises:
            AssertionError: an update counts twice, as of another round than the log says, or as made from another model than
                its round's; a round was closed with too few; a replay gives other models.
        """
        counted, newest, model = set[str](), dict[str, str](), self.models[0]
        for round_, closed in enumerate(self.closed, 1):
            assert len(closed.accepted) >= minimum, "a round was closed with too few updates"
            assert not closed.late or late, "what can't be folded late was"
            for address, said in self.updates(closed):
                assert address.round <= round_, "an update counts before its round"
                assert log.get(address) == said, "what counts isn't what the log holds for that round"
                made_of = made(address, self.models[address.round - 1], newest.get(address.node))
                assert said == made_of, "it was made from another model than its round's, or without its node's last update"
                assert said not in counted, "an update counts twice"
                counted.add(said)
                newest[address.node] = said
            model = folded(model, round_, self.updates(closed))
            assert model == self.models[round_], "a replay gives another model"
        return counted


def made(address: Address, model: str, counted: str | None) -> str:
    """Return the digest of a node's update: training gives the same for the same task, and what goes with the same update."""
    return digest(*map(str, address), model, str(counted))


def folded(model: str, round_: int, updates: Sequence[tuple[Address, str]]) -> str:
    """Return the next model: it depends on every update, and on what each is late by."""
    return digest(model, *(f"{address.node} {said} {round_ - address.round}" for address, said in updates))


def digest(*words: str) -> str:
    """Return the SHA-256 of some words, as hex."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
