"""What a plan's noise costs as its rounds go by, and where its budget ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atoll.errors import PlanError, PrivacyError
from atoll.guards import Noise
from atoll.plan import Plan
from atoll.privacy.dp import tree
from atoll.privacy.dp.accountant import COARSE, Release, composed, epsilon, multiplier_for, steps_within

RELATIONS = {
    "central_noise": "two federations are neighbours where one node's update is nothing at all in one of them, and all else is "
    "the same; who was asked is known",
    "tree_noise": "two federations are neighbours where one node's update is nothing at all in one of them, and all else is the "
    "same; each node is asked once in cohort.turns rounds",
    "poisson": "two federations are neighbours where one node's update is nothing at all in one of them, and all else is the "
    "same; who belongs to the run is known, who was drawn stays secret",
    "distributed_noise": "two federations are neighbours where one node's update is nothing at all in one of them, and all else "
    "is the same; the server too sees only the noisy sum",
    "local_noise": "any two sets of rows of a node are neighbours: its own noise hides them from the server too",
    "example_noise": "two nodes' rows are neighbours where one row counts as nothing in one of them, and all else is the same; "
    "how many there are is known, which were drawn for a step stays secret",
    "rows": "two nodes' rows are neighbours where one has one row more, and all else is the same; how many there are isn't told "
    "(steps, draws and the mean go by the plan's own number), which were drawn for a step stays secret",
}
"""What can't be told apart, by mechanism."""


@dataclass(frozen=True)
class Account:
    """The privacy of a run, by its releases: a round's model, or a round's update of a node.

    Args:
        multiplier: the noise's standard deviation over the sensitivity.
        delta: δ.
        rate: with which chance a unit's part is in a mechanism, drawn for itself and in secret; else 1.
        steps: mechanisms in one release: more than one where each local step is one.
        span: releases that these mechanisms make together: a tree's.
        most: releases that the budget allows; None where there is none.
        promise: the budget.
        unit: what is protected, in words.
        relation: of `RELATIONS`.
    """

    multiplier: float
    delta: float
    rate: float = 1.0
    steps: int = 1
    span: int = 1
    most: int | None = None
    promise: float | None = None
    unit: str = "a node"
    relation: str = RELATIONS["central_noise"]

    def spent(self, releases: int) -> float:
        """Return ε after so many releases."""
        return epsilon(self.multiplier, self.steps * -(-releases // self.span), self.delta, self.rate, COARSE)

    @property
    def release(self) -> Release:
        """One release, where each is by itself."""
        return Release(self.multiplier, self.steps, self.rate)

    def spent_by(self, multipliers: Sequence[float]) -> float:
        """Return ε after releases with these multipliers: with noise in shares, more survivors bring more."""
        if self.span > 1:
            return self.spent(len(multipliers))
        return composed((self.release._replace(multiplier=one) for one in multipliers), self.delta)

    def spent_with(self, before: Sequence[Release]) -> float:
        """Return ε after one release more than those that there were, which may have been of other noise or other rows."""
        return composed([*before, self.release], self.delta)

    def over_with(self, before: Sequence[Release]) -> str:
        """Say why there can be no release after those that there were, or nothing where there can."""
        if self.promise is None or self.spent_with(before) <= self.promise:
            return ""
        return self._over(composed(before, self.delta), len(before))

    def over(self, releases: int) -> str:
        """Say why there can be no release after so many, or nothing where there can."""
        return "" if self.most is None or releases < self.most else self._over(self.spent(releases), releases)

    def over_by(self, multipliers: Sequence[float]) -> str:
        """Do as `over`; what more survivors saved is told, but not spent: nodes, who count too, don't know of it."""
        releases = len(multipliers)
        return "" if self.most is None or releases < self.most else self._over(self.spent_by(multipliers), releases)

    def _over(self, spent: float, releases: int) -> str:
        said = f"ε {spent:.4g} of {self.promise:g} (δ {self.delta:g}) in {releases} releases"
        return f"the privacy budget is spent: {said}"


def account(plan: Plan, rows: int | None = None) -> Account | None:
    """Return the account of a plan's mechanism; None without one, or where it is a node's own and its rows aren't known.

    Args:
        plan: the plan.
        rows: how many a node trains on: by them follows how often a row is drawn, where the plan doesn't say it.

    Raises:
        PlanError: no noise is enough for what the plan promises, its budget doesn't allow for one round, or δ is no less than
            one in so many rows.
    """
    noise, key = plan.privacy.noise, f"privacy.{plan.privacy.mechanism}"
    public = plan.privacy.example_noise and plan.privacy.example_noise.rows
    if noise is None or (plan.privacy.example_noise and not (public or rows)):
        return None
    about = Account(0.0, noise.delta, promise=noise.promise, relation=RELATIONS[plan.privacy.mechanism])
    if plan.privacy.example_noise and (count := public or rows):
        if noise.delta >= 1 / (most := max(count, rows or 0)):
            raise PlanError(f"{key}.delta: {noise.delta:g} is no less than one in {most} rows; take one far below 1 / rows")
        pace, relation = plan.training.pace(count, 1, plan.plan.rounds), RELATIONS["rows" if public else "example_noise"]
        about = replace(about, rate=min(1.0, pace.batch_size / count), steps=pace.steps, unit="a row", relation=relation)
    elif plan.privacy.central_noise and plan.cohort.draw == "poisson":
        about = replace(about, rate=plan.cohort.fraction, relation=RELATIONS["poisson"])
    elif plan.privacy.tree_noise:
        if plan.cohort.turns is None:
            raise PlanError(f"{key}: a node may be in one round of a tree alone: give cohort.turns, the rounds of a tree")
        about = replace(about, steps=tree.levels(plan.cohort.turns), span=plan.cohort.turns)
    return _settled(about, noise, plan.plan.rounds, key)


def _settled(about: Account, noise: Noise, rounds: int, key: str) -> Account:
    """Return an account with its multiplier, and how many releases it allows.

    Raises:
        PlanError: as `account`.
    """
    rate, steps = about.rate, about.steps
    try:
        if noise.multiplier is None:
            assert noise.epsilon is not None  # noqa: S101  one of both is given
            needed = multiplier_for(noise.epsilon, steps * -(-rounds // about.span), noise.delta, rate)
            return replace(about, multiplier=needed, most=rounds)
        about = replace(about, multiplier=noise.multiplier)
        if noise.budget is None:
            return about
        most = steps_within(noise.budget, noise.multiplier, noise.delta, rate) // steps * about.span
    except PrivacyError as error:
        raise PlanError(f"{key}: {error}") from error
    if most == 0:
        raise PlanError(f"{key}.budget: one round takes ε {about.spent(1):.4g}, the budget is {noise.budget}; raise multiplier")
    return replace(about, most=most)
