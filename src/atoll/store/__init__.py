"""What is kept of runs: their history, their models by digest, and a node's own ledger.

Enters: rows, and groups of arrays. Leaves: the same, and a history that people and programs read. May import
ranks 0 to 2; imported by the runtimes and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.vector import Metrics

SPREAD = "spread"
"""The place of an evaluation that says how far apart the nodes' figures lie."""
Status = Literal["accepted", "rejected", "declined", "late"]


@dataclass(frozen=True)
class RunRow:
    """One execution of a plan; times are seconds since the epoch. `log_start` is where it begins in a log that runs share.

    `opened` is the round that was last begun: `round`, `attempt` and `cohort`, a list of nodes; and `late`, node → round and
    attempt, where nodes were still at work for an earlier one.
    """

    run: str
    name: str
    plan_digest: str
    plan: str
    started: float
    initial: str
    ended: float | None = None
    outcome: str = "running"
    reason: str = ""
    log_start: str | None = None
    opened: Mapping[str, Any] | None = None
    pruned: float | None = None


@dataclass(frozen=True)
class NodeRow:
    """A node that joined a run."""

    run: str
    node: str
    name: str
    key: str
    first_seen: float
    last_seen: float


@dataclass(frozen=True)
class RoundRow:
    """A closed round, and the model that it made; `registered` nodes belonged to the run.

    `reference` is the digest of the server's own update, where the method had it train too. Under central noise, `noise` says
    what it was made of, for a replay: `key` (hex), its `digest`, `multiplier` and `voices`; who has key and model has the sum
    without noise, so no history tells it, and pruning forgets the key. Other noise: see `method.noise`.
    `epsilon` is what the run has spent by now. `dissimilarity` and the updates' `cosine` are as `algorithms.drift` has them, None
    where a guard hides the updates. `fetched` are the bytes of models that the server gave out while the round was open.
    """

    run: str
    round: int
    attempt: int
    started: float
    seconds: float
    model: str
    state: str
    cohort: int
    accepted: int
    bytes: int
    registered: int = 0
    reference: str = ""
    noise: Mapping[str, Any] | None = None
    epsilon: float | None = None
    dissimilarity: float | None = None
    fetched: int | None = None


@dataclass(frozen=True)
class UpdateRow:
    """What came, or didn't, from a node in a round; `place` is its place in the fold, `norm` as `vector.check` says.

    An `offence` was refused for what the node itself put into it. An update that missed its round has `folded`, the later
    round whose model it became part of.
    """

    run: str
    round: int
    attempt: int
    node: str
    status: Status
    digest: str = ""
    bytes: int = 0
    seconds: float = 0.0
    weight: float = 0.0
    reason: str = ""
    position: str = ""
    place: int = -1
    metrics: Metrics = field(default_factory=dict)
    norm: float | None = None
    offence: bool = False
    folded: int | None = None
    cosine: float | None = None

    @property
    def counted(self) -> int:
        """The round that it counts in, or would have."""
        return self.folded or self.round


@dataclass(frozen=True)
class EvaluationRow:
    """How the model that a round made (0: the initial one) does: sums over rows of `holdout`, a node, or all `nodes`.

    At the place `SPREAD` it is how far apart the nodes' figures lie, as `metrics.spread` has it.
    """

    run: str
    round: int
    place: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Tally:
    """How much has come of a run: its closed rounds, and what came from nodes by its status.

    `last_round` and `last_update` say how far the count has got, so that it can go on from there.
    """

    rounds: int = 0
    seconds: float = 0.0
    bytes: int = 0
    updates: Mapping[str, int] = field(default_factory=dict)
    last_round: int = 0
    last_update: int = 0
