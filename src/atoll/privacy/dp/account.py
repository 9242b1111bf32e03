"""What a plan's noise costs as its rounds go by, and where its budget ends."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.errors import PlanError, PrivacyError
from atoll.plan import Plan
from atoll.privacy.dp.accountant import epsilon, multiplier_for, steps_within


@dataclass(frozen=True)
class Account:
    """The privacy of a run, by its releases: each round's model is one.

    Args:
        multiplier: the noise's standard deviation over the sensitivity.
        delta: δ.
        rate: with which chance a unit's part is in a release, drawn for itself and in secret; else 1.
        steps: mechanisms in one release: more than one where each local step is one.
        most: releases that the budget allows; None where there is none.
        promise: the budget.
        unit: what is protected, in words.
    """

    multiplier: float
    delta: float
    rate: float = 1.0
    steps: int = 1
    most: int | None = None
    promise: float | None = None
    unit: str = "a node"

    def spent(self, releases: int) -> float:
        """Return ε after so many releases."""
        return epsilon(self.multiplier, self.steps * releases, self.delta, self.rate)

    def over(self, releases: int) -> str:
        """Say why there can be no release after so many, or nothing where there can."""
        if self.most is None or releases < self.most:
            return ""
        spent = f"ε {self.spent(releases):.4g} of {self.promise:g} (δ {self.delta:g}) in {releases} rounds"
        return f"the privacy budget is spent: {spent}"


def account(plan: Plan) -> Account | None:
    """Return the account of a plan's mechanism; None without one.

    Raises:
        PlanError: no noise is enough for what the plan promises, or its budget doesn't allow for one round.
    """
    noise, rounds = plan.privacy.noise, plan.plan.rounds
    if noise is None:
        return None
    rate = plan.cohort.fraction if plan.cohort.draw == "poisson" else 1.0
    where = f"privacy.{plan.privacy.mechanism}"
    try:
        if noise.multiplier is None:
            assert noise.epsilon is not None  # noqa: S101  one of both is given
            return Account(
                multiplier_for(noise.epsilon, rounds, noise.delta, rate), noise.delta, rate, most=rounds, promise=noise.epsilon
            )
        most = steps_within(noise.budget, noise.multiplier, noise.delta, rate) if noise.budget else None
    except PrivacyError as error:
        raise PlanError(f"{where}: {error}") from error
    if most == 0:
        least = epsilon(noise.multiplier, 1, noise.delta, rate)
        raise PlanError(f"{where}.budget: one round takes ε {least:.4g}, and the budget is {noise.budget}; raise multiplier")
    return Account(noise.multiplier, noise.delta, rate, most=most, promise=noise.budget)
