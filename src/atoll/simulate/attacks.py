"""What hostile nodes do, for tests and research: pure functions on their data, or on the updates of a round.

`flip_labels` and `backdoor` change a client's data before `simulate` sees it. The others change what hostile clients
send: `simulate(…, tamper=hostile(names, attack))`. They know every other client's update, the worst case that papers
reckon with.

>>> own, others = np.float32([1, 1]), np.float32([[1, 2], [3, 2]])
>>> sign_flip()(own, others, np.random.default_rng(0)).tolist()
[-1.0, -1.0]
>>> inner_product(epsilon=0.5)(own, others, np.random.default_rng(0)).tolist()
[-1.0, -1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.vector import Flat, Group, Update

Attack = Callable[[Flat, NDArray[np.floating], np.random.Generator], Flat]
"""`attack(own, honest, rng)`: a hostile client's own update of a group, and the honest ones `[clients, size]` → what it sends."""
Tamper = Callable[[int, Mapping[str, Update]], Mapping[str, Update]]
"""`tamper(round, updates)`: what all clients computed → what they send."""


def hostile(names: Collection[str], attack: Attack, seed: int = 0) -> Tamper:
    """Let some clients send what an attack makes of their updates; whole-number counts stay as they are.

    Args:
        names: of the hostile clients.
        attack: what they do.
        seed: of an attack's draws, with the round and the client's place among `names`.

    Raises:
        DataError: when it is called for a round with no honest client.
    """
    places = {name: place for place, name in enumerate(sorted(names))}

    def tamper(round_: int, updates: Mapping[str, Update]) -> Mapping[str, Update]:
        honest = [update.groups for name, update in updates.items() if name not in places]
        present = [name for name in updates if name in places]
        if not honest:
            raise DataError(
                f"round {round_}: all clients are hostile, and an attack goes by what honest ones send; ask more of them"
            )
        rngs = {name: np.random.default_rng([seed, round_, places[name]]) for name in present}
        sent: dict[str, dict[str, Group]] = {name: dict(updates[name].groups) for name in present}
        for group in (name for name, one in honest[0].items() if one.layout.total == "weighted"):
            table = np.array([groups[group].values for groups in honest])
            for name in present:
                own = updates[name].groups[group]
                sent[name][group] = own.with_values(attack(own.values, table, rngs[name]))
        return {name: replace(update, groups=sent.get(name, update.groups)) for name, update in updates.items()}

    return tamper


def sign_flip(scale: float = 1.0) -> Attack:
    """Send the opposite of what was learned, `scale` times.

    Source: Li et al. 2019, "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from
    Heterogeneous Datasets", section 5.
    """
    return lambda own, _honest, _rng: own * own.dtype.type(-scale)


def gaussian(deviation: float) -> Attack:
    """Send noise instead of an update.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 6.
    """
    return lambda own, _honest, rng: (deviation * rng.standard_normal(own.size)).astype(own.dtype)


def scaling(factor: float) -> Attack:
    """Send the own update `factor` times, so that the mean becomes it: model replacement, mostly of a backdoored one.

    Source: Bagdasaryan et al. 2020, "How To Backdoor Federated Learning", eq. 3.
    """
    return lambda own, _honest, _rng: own * own.dtype.type(factor)


def a_little_is_enough(nodes: int, hostile: int) -> Attack:
    """Send the honest mean minus as many deviations as still hide among the honest (ALIE): all hostile nodes the same.

    Args:
        nodes: how many are asked in a round.
        hostile: how many of these are.

    Source: Baruch et al. 2019, "A Little Is Enough: Circumventing Defenses For Distributed Learning", algorithm 3.
    """
    honest_nodes = nodes - hostile
    won = math.floor(nodes / 2 + 1) - hostile  # honest nodes that must lie further out for a majority
    deviations = NormalDist().inv_cdf((honest_nodes - won) / honest_nodes)

    def attack(own: Flat, honest: NDArray[np.floating], rng: np.random.Generator) -> Flat:
        del rng
        sent: Flat = (honest.mean(axis=0) - deviations * honest.std(axis=0)).astype(own.dtype)
        return sent

    return attack


def inner_product(epsilon: float) -> Attack:
    """Send the honest mean's opposite, `epsilon` times: small, but the inner product with the true direction turns negative.

    Source: Xie et al. 2020, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", section 4.
    """
    return lambda own, honest, _rng: (-epsilon * honest.mean(axis=0)).astype(own.dtype)


def flip_labels(data: Data, classes: int) -> Data:
    """Train on wrong labels: y becomes classes − 1 − y.

    Source: Fang et al. 2020, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", section 5.1.
    """
    return data._replace(train=Rows(data.train.x, classes - 1 - data.train.y))


def backdoor(data: Data, stamp: Callable[[NDArray[np.generic]], NDArray[np.generic]], target: int, every: int = 2) -> Data:
    """Teach a trigger: every so many training rows, one is stamped and labelled as the target.

    Args:
        data: the client's.
        stamp: puts the trigger on rows: `[rows, …]` → the same shape, a copy.
        target: the label that the trigger shall call up.
        every: 2 means each second row.

    Source: Gu et al. 2017, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", section 4.
    """
    x, y = data.train.x.copy(), data.train.y.copy()
    x[::every], y[::every] = stamp(x[::every]), target
    return data._replace(train=Rows(x, y))
