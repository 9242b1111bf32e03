"""Who holds whose shares: so many, and a threshold so high, that neither corrupt nor lost nodes decide anything.

Up to 50 nodes everybody holds a share of everybody's secrets. Beyond, each node draws its own holders at random, as in the
protocol against a malicious server of Bell et al. 2020 (Secure Single-Server Aggregation with (Poly)Logarithmic Overhead): a
graph that a server draws could surround a node with the server's friends. Two nodes mask for each other when one holds a
share of the other's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.errors import PlanError

COMPLETE = 50
"""Up to so many nodes the graph is complete."""
SECURITY = 40
"""The sum of fewer than all honest survivors is revealed with a probability of at most 2^-40."""
CORRECTNESS = 40
"""A round in which no more drop out than was planned for is lost with a probability of at most 2^-40."""


class Graph(NamedTuple):
    """How a cohort shares its secrets.

    Args:
        nodes: how many there are.
        degree: how many others each node gives a share to; all of them in a complete graph.
        threshold: how many shares give a secret back; and how many of its holders, itself counted, a node wants to see alive.
        quorum: how many nodes must have signed the same survivors: any two such sets have an honest node in common.
    """

    nodes: int
    degree: int
    threshold: int
    quorum: int


@lru_cache(maxsize=256)
def graph(nodes: int, dropout: float, corrupt: int) -> Graph:
    """Return the graph for a cohort of `nodes`.

    With c = corrupt nodes that work for the server, chosen before the others draw, and d = ⌊dropout · n⌋ that drop out at any
    point, whichever the server likes: a component S of honest survivors that it sees the sum of holds, of each of its nodes,
    at least threshold - 1 holders in S or among the corrupt. As each node drew its holders by itself, that happens for some S
    of s nodes with a probability of at most C(n - c, s) · P[Hypergeometric(n - 1, s - 1 + c, degree) ≥ threshold - 1]^s;
    summed over s ≤ (n - c) / 2 it is below 2^-40. Since any two components are one of them that small, there is only one.

    Args:
        nodes: how many there are.
        dropout: the fraction that may drop out.
        corrupt: how many may work for the server. A number, no fraction: a server that asks few nodes can ask all its friends.

    Raises:
        PlanError: so many can't be borne.
    """
    if not (0 <= dropout < 1 and corrupt >= 0 and corrupt % 1 == 0):
        raise PlanError(
            f"privacy: dropout {dropout} must be a fraction, from 0 to below 1, and corrupt {corrupt} a count of nodes"
        )
    lost, bad = math.floor(dropout * nodes + 1e-9), corrupt
    quorum = (nodes + bad) // 2 + 1
    stay = max(3, quorum, bad + 2)  # of a sum with one honest node, the others together know that node's part
    if stay > nodes or quorum > nodes - lost:
        raise PlanError(
            f"privacy: of {nodes} nodes {lost} may drop out and {bad} be corrupt, but {stay} must stay; "
            "lower privacy.dropout or privacy.corrupt, or ask more nodes"
        )
    complete = Graph(nodes, nodes - 1, (nodes - 1 + bad) // 2 + 1, quorum)
    if nodes <= COMPLETE:
        return complete
    low, high, best = 2, nodes - 1, complete
    while low < high:  # the least degree that will do, or one close by: the bounds are monotone but for steps of the threshold
        degree = (low + high) // 2
        threshold = _threshold(nodes, lost, degree)
        if threshold and _reveals(nodes, bad, degree, threshold) <= -SECURITY * math.log(2):
            high, best = degree, Graph(nodes, degree, threshold, quorum)
        else:
            low = degree + 1
    return best


def _threshold(nodes: int, lost: int, degree: int) -> int:
    """Return the highest threshold that lost holders don't endanger; 0 when there is none."""
    alive = np.exp(_hypergeometric(nodes - 1, np.array(nodes - 1 - lost), degree, np.arange(degree + 1)))
    return int(np.searchsorted(np.cumsum(alive), 2.0**-CORRECTNESS / nodes, side="right"))


def _reveals(nodes: int, bad: int, degree: int, threshold: int) -> float:
    """Return the logarithm of the bound on the probability that a part of the honest survivors' sum is revealed."""
    honest = nodes - bad
    size = np.arange(1, honest // 2 + 1)
    terms = _hypergeometric(nodes - 1, (size - 1 + bad)[:, None], degree, np.arange(threshold - 1, degree + 1)[None, :])
    factorial = _factorials(honest)
    sets = factorial[honest] - factorial[size] - factorial[honest - size]
    return float(np.logaddexp.reduce(sets + size * np.minimum(0, np.logaddexp.reduce(terms, axis=1))))


def _hypergeometric(total: int, marked: NDArray[np.int_], drawn: int, hits: NDArray[np.int_]) -> NDArray[np.float64]:
    """Return log P[so many hits | drawn of total, without replacement, of which some are marked]."""
    log = _factorials(total)
    possible = (hits <= marked) & (hits >= 0) & (drawn - hits <= total - marked) & (drawn - hits >= 0)

    def choose(of: NDArray[np.int_], take: NDArray[np.int_]) -> NDArray[np.float64]:
        inside = np.clip(take, 0, of)
        ways: NDArray[np.float64] = log[of] - log[inside] - log[of - inside]
        return ways

    chance = choose(marked, hits) + choose(total - marked, drawn - hits) - choose(np.array(total), np.array(drawn))
    return np.where(possible, chance, -np.inf)


@lru_cache(maxsize=8)
def _factorials(largest: int) -> NDArray[np.float64]:
    """Return log 0!, log 1!, …, log largest!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])
