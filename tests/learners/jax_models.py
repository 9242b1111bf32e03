"""Models of plain JAX functions, as a plan names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atoll.learners.jax import Model


def _dense(key, inputs, outputs):
    return {"kernel": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "bias": jnp.zeros(outputs)}


def _through(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def linear(inputs=6, outputs=1):
    return Model(lambda key: _dense(key, inputs, outputs), lambda parameters, x, key, training: _through(parameters, x))


def deep(inputs=6, hidden=8, outputs=1):
    """Two layers."""

    def init(key):
        first, second = jax.random.split(key)
        return [_dense(first, inputs, hidden), _dense(second, hidden, outputs)]

    def apply(parameters, x, key, training):
        return _through(parameters[1], jnp.tanh(_through(parameters[0], x)))

    return Model(init, apply)


def normed(inputs=6, hidden=8, dropout=0.2):
    """A first layer that is never trained, batch norm, a count of the batches it saw, and dropout."""

    def init(key):
        first, second = jax.random.split(key)
        zeros = jnp.zeros(hidden)
        state = {"frozen": _dense(first, inputs, hidden), "mean": zeros, "variance": zeros + 1, "batches": jnp.int32(0)}
        return _dense(second, hidden, 1), state

    def apply(parameters, state, x, key, training):
        x = _through(state["frozen"], x)
        mean, variance = (x.mean(0), x.var(0)) if training else (state["mean"], state["variance"])
        if training:
            moved = {name: 0.9 * state[name] + 0.1 * new for name, new in (("mean", mean), ("variance", variance))}
            state = {**state, **moved, "batches": state["batches"] + 1}
        x = jax.nn.relu((x - mean) / jnp.sqrt(variance + 1e-3))
        if training:
            x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0)
        return _through(parameters, x), state

    return Model(init, apply, stateful=True)


def words(kinds=20, width=4, length=6):
    """An embedding, and the same weights once more as the output layer's."""

    def init(key):
        return {"embedding": jax.random.normal(key, (kinds, width)), "places": jnp.ones(length) / length}

    def apply(parameters, x, key, training):
        table = parameters["embedding"]
        return jnp.sum(jnp.einsum("l,rlw->rw", parameters["places"], table[x]) @ table.T, axis=1, keepdims=True)

    return Model(init, apply)


def own_loss(inputs=6):
    """Brings its loss along: the squared error of a probability."""
    model = linear(inputs)
    return model._replace(loss=lambda outputs, y: (jax.nn.sigmoid(outputs[:, 0]) - y) ** 2)


def half(inputs=6):
    return Model(lambda key: jnp.zeros(inputs, jnp.float16), lambda parameters, x, key, training: x @ parameters)


def no_model():
    return "a model"


def brier(predictions, y):
    """A metric: the sum of squared errors of probabilities, and how many rows are sure."""
    chances = jax.nn.sigmoid(predictions[:, 0])
    return {"brier": ((chances - y) ** 2).sum(), "sure": (abs(chances - 0.5) > 0.4).sum()}
