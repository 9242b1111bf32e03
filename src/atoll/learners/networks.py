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
        if len(sizes) == 2:  # nothing is drawn, so nothing is compiled for it
            return [{"bias": jnp.zeros(sizes[1]), "kernel": jnp.zeros((sizes[0], sizes[1]))}]
        return [_dense(jax.random.fold_in(key, at), *pair) for at, pair in enumerate(pairwise(sizes))]

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


def convolutional(height: int = 28, width: int = 28, channels: int = 1, classes: int = 10) -> Model:
    """Return the CNN of McMahan et al. 2017: convolutions of 5 × 5 with 32 and 64 channels, 2 × 2 pools, 512 dense units.

    Rows are pictures `[height, width, channels]`, or as many numbers in that order; height and width are multiples of 4.
    Convolutions are products of matrices: in a compiled loop, as strategies `scan` and `vmap` have them, XLA's own gradients
    take ten times as long on processors.

    Source: McMahan et al. 2017, section 3 (1,663,370 parameters); weights as in `perceptron`.
    """
    dense = [5 * 5 * channels, 32], [5 * 5 * 32, 64], [height // 4 * (width // 4) * 64, 512], [512, classes]

    def init(key: Any) -> list[dict[str, Any]]:
        return [_dense(jax.random.fold_in(key, at), inputs, outputs) for at, (inputs, outputs) in enumerate(dense)]

    def apply(parameters: list[dict[str, Any]], x: Any, key: Any, training: bool) -> Any:
        del key, training
        *convolutions, hidden, last = parameters
        x = x.reshape(len(x), height, width, channels)
        for layer in convolutions:
            x = jax.nn.relu(_patches(x) @ layer["kernel"] + layer["bias"])
            pairs = jnp.maximum(x[:, ::2], x[:, 1::2])
            x = jnp.maximum(pairs[:, :, ::2], pairs[:, :, 1::2])
        x = jax.nn.relu(x.reshape(len(x), -1) @ hidden["kernel"] + hidden["bias"])
        return x @ last["kernel"] + last["bias"]

    return Model(init, apply)


def _dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    return {"bias": jnp.zeros(outputs), "kernel": jax.random.normal(key, (inputs, outputs)) * (2 / inputs) ** 0.5}


def _patches(x: Any) -> Any:
    """Return each pixel's 5 × 5 neighbours, zeros beyond the edge: `[rows, height, width, 25 · channels]`."""
    _, height, width, _ = x.shape
    wide = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return jnp.concatenate([wide[:, i : i + height, j : j + width] for i in range(5) for j in range(5)], axis=-1)


def lstm(symbols: int = 98, embedding: int = 8, hidden: int = 128, layers: int = 1) -> Model:
    """Return what tells the next character at each place of a text: an embedding, layers of LSTM, and a score for each symbol.

    Rows are codes `[places]`, as `data.characters` makes them; outputs `[rows, places, symbols]`. The usual alphabet gives 98
    symbols: its 96 characters, the end, and any other character.

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, whose bias begins at 1 (Jozefowicz et al.
    2015, section 2.2). Two layers of 256 are that of McMahan et al. 2017, section 3.
    """
    sizes = [embedding, *[hidden] * layers]

    def init(key: Any) -> dict[str, Any]:
        keys = jax.random.split(key, layers + 2)
        forget = jnp.zeros((4, hidden)).at[1].set(1).reshape(-1)
        drawn = [
            jax.random.normal(keys[at], (inputs + hidden, 4 * hidden)) * (inputs + hidden) ** -0.5
            for at, inputs in enumerate(sizes[:-1])
        ]
        return {
            "embedding": jax.random.normal(keys[-2], (symbols, embedding)),
            "layers": [{"bias": forget, "kernel": kernel} for kernel in drawn],
            "scores": {"bias": jnp.zeros(symbols), "kernel": jax.random.normal(keys[-1], (hidden, symbols)) * hidden**-0.5},
        }

    def apply(parameters: dict[str, Any], x: Any, key: Any, training: bool) -> Any:
        del key, training
        places = parameters["embedding"][x.astype(jnp.int32).T]
        for layer in parameters["layers"]:
            places = _recurrent(layer, places)
        return jnp.swapaxes(places @ parameters["scores"]["kernel"] + parameters["scores"]["bias"], 0, 1)

    return Model(init, apply)


def _recurrent(layer: dict[str, Any], places: Any) -> Any:
    """One layer of LSTM over `[places, rows, inputs]`: `[places, rows, hidden]`."""
    hidden = layer["bias"].shape[0] // 4
    into, back = layer["kernel"][:-hidden], layer["kernel"][-hidden:]

    def step(carry: Any, gates: Any) -> Any:
        out, cell = carry
        enter, forget, leave, new = jnp.split(gates + out @ back, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        out = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (out, cell), out

    # What enters is multiplied for all places at once.
    gates = places @ into + layer["bias"]
    nothing = jnp.zeros((places.shape[1], hidden), gates.dtype)
    return jax.lax.scan(step, (nothing, nothing), gates)[1]
