"""Differential privacy for single rows: a learner whose every step is a noisy sum of clipped gradients (DP-SGD).

Rows are drawn for each step by chance, each for itself, by the operating system's generator; each row's gradient is made no
longer than a bound, and noise is added to their sum before anything is made of it. So what leaves the node, and what an
algorithm's own correction sees, is private already.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.errors import PlanError
from atoll.keys import Keystream, new_secret
from atoll.learner import Correct, Fit, Learner, PerExample, Rows
from atoll.plan import Plan
from atoll.privacy.dp.account import account
from atoll.privacy.dp.clip import STEPS, shortened, squares, whole
from atoll.privacy.dp.noise import discrete_gaussian
from atoll.vector import Flat, Group, Groups, Metrics

_NUMBERS = 1 << 18
"""Of noise, drawn at once."""


class Private:
    """A learner for one round's training under `example_noise`; see `Learner`.

    It fits once, as the plan's `[training]` says: what more an algorithm asks for, a second fit or a look at how a model does on
    the rows, would cost what nobody planned.

    Args:
        learner: with plain steps.
        plan: its training and noise.

    Raises:
        PlanError: an algorithm asked for more.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1.
    """

    def __init__(self, learner: Learner, plan: Plan) -> None:
        self._inner, self._plan = learner, plan
        self.layouts, self.can = learner.layouts, learner.can - {"scan", "vmap", "curvature"}
        self._fitted = False

    def initial(self, seed: int) -> Groups:
        """See `Learner.initial`."""
        return self._inner.initial(seed)

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """Refuse: how a model does on rows is told by no noise."""
        del groups, rows
        raise PlanError(self._more("looks at how a model does on the rows"))

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
    ) -> Fit:
        """See `Learner.fit`; batches have `batch_size` rows on average, and none of their metrics is told."""
        about, noise = account(self._plan, len(rows)), self._plan.privacy.example_noise
        del batch_size  # of the plan, and so in the account
        if about is None or noise is None:
            raise PlanError("privacy.example_noise: is missing, or there is no row")
        if self._fitted or steps != about.steps:
            raise PlanError(self._more("trains more often than [training] says"))
        self._fitted = True
        stream, vector = Keystream(new_secret()), groups["parameters"].values.copy()
        noises = np.empty((0, vector.size), np.int64)
        speed, mean = self._plan.training.learning_rate * rate, noise.clip / STEPS / (about.rate * (noise.rows or len(rows)))
        at_once = max(1, min(steps, _NUMBERS // vector.size))  # one call draws for many steps of a small model
        for step in range(steps):
            if step % at_once == 0:
                noises = discrete_gaussian(about.multiplier * STEPS, at_once * vector.size, stream).reshape(at_once, -1)
            drawn = _drawn(len(rows), about.rate, stream)
            total = self._summed(groups, vector, Rows(rows.x[drawn], rows.y[drawn]), noise.clip, rng)
            total += noises[step % at_once]
            gradient = (total * mean).astype(vector.dtype)
            vector -= (speed * (gradient if correct is None else correct(gradient, vector))).astype(vector.dtype)
        return Fit(_at(groups, vector), {})  # all but the parameters as it came: nothing of the rows is in it

    def _summed(self, groups: Groups, vector: Flat, rows: Rows, bound: float, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return the sum of the rows' clipped gradients at a vector, in whole steps of bound/2²⁰."""
        if isinstance(self._inner, PerExample) and len(rows):
            return self._inner.clipped(_at(groups, vector), rows, bound, STEPS)
        total = np.zeros(vector.size)

        def see(gradient: Flat, here: Flat) -> Flat:
            del here
            if np.isfinite(norm := squares(gradient) ** 0.5):
                np.add(total, whole(gradient, shortened(norm, bound) * STEPS / bound), out=total)
            return np.zeros_like(gradient)  # plain steps: the model stands still

        if len(rows):
            self._inner.fit(_at(groups, vector), rows, len(rows), 1, rng, see)
        return total

    def _more(self, what: str) -> str:
        return f"privacy.example_noise: '{self._plan.aggregation.rule}' {what}, which no noise was planned for; take fedavg"


def _at(groups: Groups, vector: Flat) -> dict[str, Group]:
    return {**groups, "parameters": groups["parameters"].with_values(vector)}


def _drawn(rows: int, rate: float, stream: Keystream) -> NDArray[np.intp]:
    """Draw each row for itself with the same chance."""
    words = np.frombuffer(stream.take(8 * rows), np.uint64)
    return np.flatnonzero(words < np.uint64(min(int(rate * 2.0**64), (1 << 64) - 1)))
