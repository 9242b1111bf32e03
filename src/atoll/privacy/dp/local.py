"""Local differential privacy: a node's own noise, so that nobody has to be trusted; and answers given by chance.

The promise is one about all that a node has: whatever its rows are, what leaves it looks much the same. It takes noise for
each node by itself, so many nodes' are needed for a mean that says something.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from atoll.errors import PrivacyError
from atoll.keys import Keystream
from atoll.privacy.dp.clip import STEPS, length, shortened, whole
from atoll.privacy.dp.noise import discrete_gaussian
from atoll.vector import Group, Groups


def noisy(groups: Groups, bound: float, multiplier: float, key: bytes) -> dict[str, Group]:
    """Return an update made no longer than a bound, with Gaussian noise of `multiplier` times 2 · bound on each number.

    Twice the bound: between any two updates of that length. Values and noise are whole steps of bound/2²⁰.

    Args:
        groups: the update's.
        bound: the longest that it may be, over all groups.
        multiplier: the noise's standard deviation over what other rows can change.
        key: 32 bytes of the operating system's generator, for this update alone.
    """
    scale, stream = shortened(length(groups), bound) * STEPS / bound, Keystream(key)
    found = {}
    for name in sorted(groups):
        values = groups[name].values
        drawn = discrete_gaussian(2 * multiplier * STEPS, values.size, stream)
        found[name] = groups[name].with_values((whole(values, scale) + drawn) * (bound / STEPS))
    return found


def randomised(answers: NDArray[np.int64], choices: int, epsilon: float, key: bytes) -> NDArray[np.int64]:
    """Return answers of which each is the true one with the chance e^ε / (e^ε + k − 1), and else any other of k choices.

    Args:
        answers: `[people]`, from 0 to k − 1.
        choices: k, at least 2.
        epsilon: of each person's answer; δ is 0.
        key: 32 bytes of the operating system's generator, for these answers alone.

    Raises:
        PrivacyError: ε isn't above 0, there are no choices, or an answer is none of them.

    Source: Warner 1965; for k choices Kairouz, Bonawitz, Ramage 2016, "Discrete Distribution Estimation under Local Privacy".
    """
    if not (0 < epsilon < math.inf and choices >= 2):
        raise PrivacyError(f"randomised response takes epsilon above 0 and two choices or more, not {epsilon} and {choices}")
    if answers.size and not (answers.min() >= 0 and answers.max() < choices):
        raise PrivacyError(f"an answer that is none of {choices} choices, 0 to {choices - 1}")
    words = np.frombuffer(Keystream(key).take(16 * answers.size), np.uint64).reshape(2, -1)
    # An other one with the chance (k−1)/(e^ε+k−1), rounded up: of 2⁶⁴, no more than a part is in favour of the truth.
    lie = math.ceil((choices - 1) / (math.exp(epsilon) + choices - 1) * 2.0**64) if epsilon < 700 else 1
    lies = words[0] < np.uint64(min(lie + 2048, (1 << 64) - 1))  # 2048: what a float of that size is rounded by
    shifts = (words[1] % np.uint64(choices - 1)).astype(np.int64) + 1
    return np.where(lies, (answers + shifts) % choices, answers)


def estimated(answers: NDArray[np.int64], choices: int, epsilon: float) -> NDArray[np.float64]:
    """Return how many people would have given each answer, from randomised ones: right on average, `[choices]`.

    Args:
        answers: as `randomised` gave them.
        choices: as there.
        epsilon: as there.
    """
    counts = np.bincount(answers, minlength=choices)
    other = 1 / (math.exp(epsilon) + choices - 1)
    return np.asarray((counts - answers.size * other) / (math.exp(epsilon) * other - other), np.float64)
