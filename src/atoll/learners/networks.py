"""Ready models of plain JAX functions, for `[model] jax = "atoll.learners.networks:perceptron"`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from atoll.learners.jax import Model


def perceptron(sizes: Sequence[int]) -> Model:
    """Return dense layers with ReLU between them: `[784, 200, 200, 10]` is the 2NN of McMahan et al. 2017, section 3.

    A row of any shape is taken as one vector; what the last hidden layer makes of it stands for it. Two sizes are a linear
    model, which begins at zero.

    Args:
        sizes: of the input, of each hidden layer, and of the output.

    Source of the weights' variance, 2 / inputs: He et al. 2015, "Delving Deep into Rectifiers", eq. 10.
    """

    def init(key: Any) -> list[dict[str, Any]]:
        deep = len(sizes) > 2
        return [
            {
                "bias": jnp.zeros(outputs),
                "kernel": jax.random.normal(jax.random.fold_in(key, at), (inputs, outputs)) * (2 / inputs) ** 0.5 * deep,
            }
            for at, (inputs, outputs) in enumerate(pairwise(sizes))
        ]

    def apply(parameters: list[dict[str, Any]], x: Any, key: Any, training: bool) -> Any:
        x = represent(parameters, x, key, training)
        return x @ parameters[-1]["kernel"] + parameters[-1]["bias"]

    def represent(parameters: list[dict[str, Any]], x: Any, key: Any, training: bool) -> Any:
        del key, training
        x = x.reshape(len(x), -1)
        for layer in parameters[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x

    return Model(init, apply, represent=represent if len(sizes) > 2 else None)
