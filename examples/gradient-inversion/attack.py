"""Rows out of an update: what a server can do with one that nothing hides. It knows the plan, the model and the update, no more.

Two attacks. `by_units` is arithmetic: each unit of a first dense layer that one row alone activates gives that row exactly
(Boenisch et al. 2021, "When the Curious Abandon Honesty", section 4). `by_matching` looks for pictures, and their labels, whose
gradient points the way that the update does (Zhu et al. 2019, "Deep Leakage from Gradients"; with the cosine and total
variation of Geiping et al. 2020, "Inverting Gradients", eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from atoll.learners.networks import perceptron

Pictures = NDArray[np.float32]
"""Of shape [pictures, pixels], from 0 to 1."""
Arrays = Mapping[str, NDArray[np.float32]]
"""A perceptron's arrays by name: `0/kernel`, `0/bias`, …"""
SMOOTH = 1e-4


def by_units(update: Arrays, most: int = 64) -> Pictures:
    """Return what the first layer's units give that are pictures at all, each once.

    A unit's weights change by −η Σᵢ δᵢxᵢ and its bias by −η Σᵢ δᵢ: where one row alone activated it, their ratio is that row.
    """
    kernel, bias = update["0/kernel"], update["0/bias"]
    moved = np.abs(bias) > 1e-6 * np.abs(bias).max(initial=1e-30)
    ratios = (kernel[:, moved] / bias[moved]).T
    pictures = [one for one in ratios if one.min() > -0.02 and one.max() < 1.02 and one.std() > 0.02]
    found: list[NDArray[np.float32]] = []
    for one in pictures:
        if all(similarity(one, other) < 0.98 for other in found) and len(found) < most:
            found.append(one)
    return np.array(found, np.float32).reshape(-1, kernel.shape[0])


def by_matching(model: Arrays, update: Arrays, sizes: list[int], rows: int, steps: int = 800, seed: int = 0) -> Pictures:
    """Return as many pictures as there were rows, made to have a gradient like the update.

    Args:
        model: what was sent to the node.
        update: what came back.
        sizes: of the perceptron.
        rows: how many the node trained on: its weight says so.
        steps: of Adam.
        seed: of the pictures to begin with.
    """
    layers = [{kind: jnp.asarray(model[f"{at}/{kind}"]) for kind in ("bias", "kernel")} for at in range(len(sizes) - 1)]
    sought = _flat([{kind: -update[f"{at}/{kind}"] for kind in ("bias", "kernel")} for at in range(len(sizes) - 1)])
    rng = np.random.default_rng(seed)
    begin = tuple(jnp.asarray(rng.normal(0, 0.1, (rows, width)), jnp.float32) for width in (sizes[0], sizes[-1]))
    return np.asarray(_search(tuple(sizes), steps)(layers, sought, begin))


@lru_cache
def _search(sizes: tuple[int, ...], steps: int) -> Any:
    """Return the compiled search: (layers, direction, where to begin) → pictures."""
    apply, side, adam = perceptron(sizes).apply, round(sizes[0] ** 0.5), optax.adam(0.1)

    def distance(hidden: Any, layers: Any, sought: jax.Array) -> jax.Array:
        x, labels = jax.nn.sigmoid(hidden[0]), jax.nn.softmax(hidden[1])

        def loss(layers: Any) -> jax.Array:
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(apply(layers, x, None, False)), axis=1))

        found, square = _flat(jax.grad(loss)(layers)), x.reshape(-1, side, side)
        rough = jnp.abs(jnp.diff(square, axis=1)).mean() + jnp.abs(jnp.diff(square, axis=2)).mean()
        return 1 - found @ sought / (jnp.linalg.norm(found) * jnp.linalg.norm(sought) + 1e-12) + SMOOTH * rough

    def search(layers: Any, sought: jax.Array, begin: Any) -> jax.Array:
        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            change, inner = adam.update(jax.grad(distance)(state[0], layers, sought), state[1])
            return (optax.apply_updates(state[0], change), inner), None

        (hidden, _), _ = jax.lax.scan(step, (begin, adam.init(begin)), None, steps)
        return jax.nn.sigmoid(hidden[0])

    return jax.jit(search)


def similarity(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return Pearson's correlation of two pictures: 1 for the same one, about 0 for noise."""
    a, b = one - one.mean(), other - other.mean()
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def best(found: Pictures, true: Pictures) -> list[float]:
    """Return for each true picture how similar the most similar one of those found is."""
    return [max((similarity(one, row) for one in found), default=0.0) for row in true]


def nearest(found: Pictures, true: Pictures) -> Pictures:
    """Return for each true picture the most similar one of those found; black where none was found."""
    if not len(found):
        return np.zeros_like(true)
    return np.array([max(found, key=lambda one: similarity(one, row)) for row in true])


def _flat(tree: object) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
