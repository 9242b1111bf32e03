"""Local fine-tuning: FedAvg, and each node goes on from the model it received for its own use."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only
from atoll.errors import PlanError
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Groups


def finetune(steps: int | None = None, *, weighted: bool = True) -> Algorithm:
    """Average as FedAvg does; what a node judges, and keeps at the end, is the model after `steps` more of its own.

    Args:
        steps: mini-batches; without it as many as in a round.
        weighted: by rows; else each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Wang et al. 2019, "Federated Evaluation of On-device Personalization", section 3.
    """
    if steps is not None and not (type(steps) is int and steps >= 1):
        raise PlanError(f"aggregation.options.steps: it is a whole number from 1 up; it is {steps!r}")

    def own(learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
        del memory
        received = only(brief, learner.layouts)
        return learner.fit(received, rows, steps or pace.steps, pace.batch_size, rng, rate=pace.rate).groups

    return fedavg(weighted=weighted)._replace(own=own)
