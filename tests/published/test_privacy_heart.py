"""FLamby's published DP on Fed-Heart-Disease (Ogier du Terrail et al. 2022; owkin/FLamby, strategies/utils.py, commit 027569a6).

FedAvg as in `test_fedavg_heart.py`, with Opacus on each hospital: clip 1.1, and the noise that `make_private_with_epsilon` finds
by its RDP accountant for as many *epochs* as there are rounds. A trap: a round is 100 steps of batch 4, more than an epoch at
each hospital, so the noise is less than ε takes; the test prints what it truly was. The learning rate isn't published: at .001
the plateau lies at .66, at .003162, the next of the study's grid, at .72; published is .70. What privacy costs is compared, from
that plateau down: `pytest -s tests/published/test_privacy_heart.py` prints the table.
"""

from __future__ import annotations

from functools import cache

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant
from tests.published.conftest import HOSPITALS
from tests.published.test_fedavg_heart import PLAN, SEEDS, Drawn

from atoll.privacy.dp.accountant import COARSE, epsilon
from atoll.privacy.dp.example import Private
from atoll.simulate import simulate

RATE, CLIP, BATCH, ROUNDS, STEPS = 0.003162, 1.1, 4, 15, 100
MINE = PLAN.with_(training={"learning_rate": RATE})
PUBLISHED = {(5.0, 1e-4): 0.70, (1.0, 1e-4): 0.685, (0.1, 1e-4): 0.606, (0.1, 0.1): 0.711}
"""ε and δ → the mean accuracy over the four hospitals, and over the seeds."""


@cache
def opacus(rows: int, target: float, delta: float) -> float:
    """The noise multiplier that Opacus finds: by RDP, for 15 epochs of the hospital's own loader, to .01 in ε."""
    rate = 1 / -(-rows // BATCH)
    low, high = 0.0, 100.0

    def spent(noise: float) -> float:
        one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        return RdpAccountant(range(2, 64)).compose(one, int(ROUNDS / rate)).get_epsilon(delta)

    while target - spent(high) > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) < target else (middle, high)
    return high


class Theirs(Drawn):
    """The study's model, whose every fit is DP-SGD with the noise that a hospital of so many rows had there."""

    aim = (1.0, 1e-4)

    def fit(self, groups, rows, steps, batch_size, rng, correct=None, *, rate=1.0):
        noise = {"multiplier": opacus(len(rows), *self.aim), "delta": 1e-4, "clip": CLIP}
        private = Private(Drawn(13, RATE), MINE.with_(privacy={"example_noise": noise}))
        return private.fit(groups, rows, steps, batch_size, rng, correct, rate=rate)


def test_published_privacy(hospitals):
    ours = {}
    for aim, published in PUBLISHED.items():
        learner, figures = Theirs(13, RATE), []
        learner.aim = aim
        for seed in SEEDS[:3]:
            run = simulate(MINE.with_(plan={"seed": seed}), hospitals, learner=learner, judge_every=15)
            figures.append(np.mean([run.by_node[name]["accuracy"] for name in HOSPITALS]))
        ours[aim], noise = float(np.mean(figures)), opacus(199, *aim)
        truly = epsilon(noise, ROUNDS * STEPS, aim[1], BATCH / 199, COARSE)
        said = f"{ours[aim]:.3f}, published {published}; noise at Cleveland {noise:.2f}, truly ε {truly:.2f}"
        print(f"ε {aim[0]} δ {aim[1]}: {said}")  # noqa: T201  shown with -s
    plateau = (5.0, 1e-4)
    for aim, published in PUBLISHED.items():
        lost, lost_there = ours[plateau] - ours[aim], PUBLISHED[plateau] - published
        chance = 0.09 if aim == (0.1, 1e-4) else 0.05  # three seeds; the noise is the operating system's, and most at this ε
        assert abs(lost - lost_there) < chance, f"what ε {aim[0]} at δ {aim[1]} costs"
