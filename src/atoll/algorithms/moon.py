"""MOON: what a node's model makes of a row is held near the federation's, and away from what the node had before."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only, trained
from atoll.algorithms.options import above_0, at_least_0
from atoll.learner import Lean, Learner, Representing, Rows
from atoll.training import Pace
from atoll.vector import Groups, Update

_SHORT = 1e-8
"""No representation counts as shorter than this: a cosine of nothing is 0."""


def moon(mu: float = 1.0, temperature: float = 0.5, layer: str | None = None, *, weighted: bool = True) -> Algorithm:
    """Fit the loss and μ times a contrast of representations; then average. The node keeps the model that it fitted.

    With z what the model in training makes of a row, z_glob what the received one does and z_prev what the node's last one
    did, the contrast is ℓ = −log e^{sim(z, z_glob)/τ} / (e^{sim(z, z_glob)/τ} + e^{sim(z, z_prev)/τ}) (eq. 3), sim a cosine, and
    the node's loss is its own + μ ℓ (eq. 4 and 5). In a node's first round there is no z_prev, and it is FedAvg.

    Args:
        mu: μ, how much the contrast counts; with 0 it is FedAvg.
        temperature: τ: the smaller, the more a small difference of the cosines counts.
        layer: of a Keras or PyTorch model, by name: its output stands for a row. Else what the last layer with weights takes.
        weighted: by rows, as in the paper; else each node has one voice.

    Raises:
        PlanError: an option out of its range; or, once the model is known, it has no such layer.

    Source: Li, He, Song 2021, "Model-Contrastive Federated Learning", eq. 3 to 5 and Algorithm 1.
    """
    at_least_0(mu=mu)
    above_0(temperature=temperature)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        received = only(brief, learner.layouts)
        lean = None
        if memory and mu:
            seeing = cast("Representing", learner)
            near, far = seeing.represent(received, layer), seeing.represent(memory, layer)
            lean = Lean(layer, lambda x, z: mu * slope(z, near(x), far(x), temperature))
        update = trained(learner, brief, rows, pace, rng, lean=lean)
        fitted = {name: group.with_values(group.values + update.groups[name].values) for name, group in received.items()}
        return fitted, update

    def fits(learner: Learner) -> None:
        cast("Representing", learner).represent(learner.initial(0), layer)

    return fedavg(weighted=weighted)._replace(local=local, needs=frozenset({"represent"}), fits=fits)


def slope(z: NDArray[Any], near: NDArray[Any], far: NDArray[Any], temperature: float) -> NDArray[Any]:
    """Return the gradient `[rows, width]`, by z, of the mean contrast over the rows (eq. 3).

    ℓ = log(1 + e^{(b − a)/τ}) with a = sim(z, z_glob) and b = sim(z, z_prev), so ∂ℓ/∂z = σ((b − a)/τ) (∂b/∂z − ∂a/∂z) / τ.
    """
    (a, up), (b, down) = _cosine(z, near), _cosine(z, far)
    share = 1 / (1 + np.exp((a - b) / temperature)) / temperature / len(z)
    found: NDArray[Any] = share[:, None] * (down - up)
    return found


def _cosine(z: NDArray[Any], other: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return each row's cosine `[rows]`, and its gradient by z: (ô − cos ẑ) / ‖z‖."""
    length = np.maximum(np.linalg.norm(z, axis=1, keepdims=True), _SHORT)
    away = other / np.maximum(np.linalg.norm(other, axis=1, keepdims=True), _SHORT)
    cosine = np.sum(z / length * away, axis=1)
    return cosine, (away - cosine[:, None] * z / length) / length
