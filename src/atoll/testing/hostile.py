"""Nodes that turn hostile in a simulated world, or are revoked; and what must hold about them whatever else happens."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from atoll.plan import Plan
from atoll.server import events
from atoll.server.offences import Conduct, length_of
from atoll.server.resume import conduct_of
from atoll.server.state import State, admits
from atoll.store import UpdateRow
from atoll.testing.world import World
from atoll.wire import Address

_LONG = 1e9


class Hostile:
    """What hostile nodes did, as far as the server has stored it.

    Args:
        plan: its `[checks]`.
        world: whose chance decides what a hostile node sends.
        nodes: the hostile ones.

    Attributes:
        revoked: node → how many rounds were closed when it was.
        held: how often a node was held out.
        back: the nodes that were asked again after that.
    """

    def __init__(self, plan: Plan, world: World, nodes: Collection[str]) -> None:
        self._plan, self._world, self._nodes = plan, world, nodes
        self._rows: dict[Address, UpdateRow] = {}
        self._norms: dict[str, float | None] = {}
        self.revoked: dict[str, int] = {}
        self.held = 0
        self.back: set[str] = set()

    def spoils(self, node: str, digest: str) -> None:
        """Decide what a node's new update holds: a hostile one's is honest, unreadable, or long."""
        if node in self._nodes:
            self._norms.setdefault(digest, self._world.chance.choice([1.0, None, None, _LONG]))

    def arrives(self, state: State, address: Address, digest: str, now: float) -> events.Event:
        """Verify an update as a server does: only one that may count is looked into."""
        norm = self._norms.get(digest, 1.0)
        if admits(state, address) is None and norm is None:
            return events.Refused(now, address, digest, 1, "it holds NaN")
        return events.Appended(now, address, digest, 1, length_of(self._plan, norm, 1.0, address.round))

    def refused(self, judge: events.Judge) -> None:
        """The server stores a refusal; once, however often it comes."""
        if judge.offence and judge.address not in self._rows:
            self._rows[judge.address] = UpdateRow(*judge.address, "rejected", judge.digest, norm=judge.norm, offence=True)
            self.held += len(self._offences(judge.address.node)) % self._plan.checks.offences == 0

    def closed(self, round_: int, addresses: Mapping[Address, str]) -> None:
        """The server stores a closed round."""
        for place, (address, digest) in enumerate(addresses.items()):
            norm = self._norms.get(digest, 1.0)
            assert norm is not None, "what can't be read counts"
            assert address not in self._rows, "what was refused counts"
            gone = self.revoked.get(address.node)
            assert gone is None or address.round <= gone + 1, "an update of a node that was revoked before counts"
            self._rows[address] = UpdateRow(*address, "accepted", digest, weight=1.0, place=place, norm=norm, folded=round_)

    def conduct(self) -> Conduct:
        """Count again from what is stored, as a server does that takes up a run."""
        rows = sorted(self._rows.values(), key=lambda row: (row.counted, row.place, row.attempt))
        return conduct_of(self._plan, rows)

    def asked(self, command: events.Train) -> None:
        """Check who is asked."""
        for node in command.nodes:
            until = self._until(node)
            assert command.round > until, f"{node} is held out until round {until} is over, and is asked in round {command.round}"
            if until:
                self.back.add(node)

    def _offences(self, node: str) -> list[int]:
        """The rounds of a node's offences, in their order."""
        return sorted(address.round for address, row in self._rows.items() if row.offence and address.node == node)

    def _until(self, node: str) -> int:
        """The last round that a node is held out of, counted anew and by other means than the machine's."""
        mine, borne = self._offences(node), self._plan.checks.offences
        whole = len(mine) // borne * borne
        return mine[whole - 1] + self._plan.checks.held_out if whole else 0
