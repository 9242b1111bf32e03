"""How much of its step an update keeps that is late by τ rounds: 1 at τ = 0, with the same bits on every machine."""

from __future__ import annotations

import math
from decimal import Decimal


def buffered(late: int) -> float:
    """Return s(τ) = (1 + τ)^-1/2; the weight stays whole, so updates that are all late make a shorter step.

    Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", section 3 and algorithm 1.

    >>> buffered(0), buffered(3)
    (1.0, 0.5)
    """
    return 1 / math.sqrt(1 + late)  # each step rounded the one right way: the same bits on every machine


def polynomial(late: int, a: float) -> float:
    """Return s(τ) = (1 + τ)^-a.

    Source: Xie et al. 2019, "Asynchronous Federated Optimization", section 5.2.

    >>> polynomial(0, 0.5), polynomial(3, 0.5), polynomial(1, 2.0)
    (1.0, 0.5, 0.25)
    """
    return float(Decimal(1 + late) ** -Decimal(a))


def hinge(late: int, a: float, b: int) -> float:
    """Return s(τ) = 1 up to b rounds, then 1 / (a (τ − b) + 1).

    Source: as `polynomial`.

    >>> hinge(4, 10.0, 4), hinge(5, 1.0, 4)
    (1.0, 0.5)
    """
    return 1.0 if late <= b else 1 / (a * (late - b) + 1)
