"""Fitting on JAX, by Keras' stateless API: one compiled step from variables to variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoll.learner import Correct, filled
from atoll.learners import by_row
from atoll.learners.keras.engine import Objective
from atoll.learners.named import alike
from atoll.vector import Layout

_FILLED = 4096
"""Rows to judge are filled up to a power of two, so that few sizes are compiled; more rows than this are not."""


class Stateless:
    """A Keras model as pure functions, its own variables stay as they are; see `Engine`."""

    def __init__(self, model: Any, optimizer: Any, objective: Objective, layout: Layout) -> None:
        self._model, self._optimizer, self._objective, self._layout = model, optimizer, objective, layout

    def begin(self, trainable: Sequence[Any], others: Sequence[Any], rate: float, seed: int) -> Any:
        """See `Engine.begin`; the learning rate is a variable of the optimiser, so that another one compiles nothing anew."""
        del seed  # all that is random here is among the variables
        speed = self._optimizer.learning_rate
        state = [jnp.asarray(one.value) * (rate if one is speed else 1) for one in self._optimizer.variables]
        return [jnp.asarray(one) for one in trainable], [jnp.asarray(one) for one in others], state

    def step(self, carry: Any, x: Any, y: Any, correct: Correct | None) -> Any:
        """See `Engine.step`."""
        if correct is None:
            return self._step(carry, x, y)
        (_, kept), gradient = self._gradient_only(carry[0], carry[1], x, y)
        return self.apply(carry, (kept, gradient), correct)

    def apply(self, carry: Any, found: Any, correct: Correct | None) -> tuple[Any, Any]:
        """Go one step along a gradient; `found` is `((others, loss summed), gradient)`."""
        trainable, _, state = carry
        (others, loss), gradient = found
        if correct is not None:
            flat = [np.concatenate([np.ravel(part) for part in parts]) for parts in (gradient, trainable)]
            mended = np.asarray(correct(flat[0], flat[1]), np.float32)
            gradient = [jnp.asarray(array) for array in self._layout.views(mended).values()]
        trainable, state = self._optimizer.stateless_apply(state, gradient, trainable)
        return (trainable, others, state), loss

    def end(self, carry: Any) -> tuple[list[Any], list[Any]]:
        """See `Engine.end`."""
        return carry[0], carry[1]

    def clipped(self, carry: Any, drawn: Mapping[int, Any], x: Any, y: Any, there: Any, bound: Any, steps: Any) -> Any:
        """See `Engine.clipped`; by vmap."""
        return self._clipped(carry[:2], dict(drawn), x, y, there, bound, steps)

    @cached_property
    def _clipped(self) -> Any:
        def one(carry: Any, drawn: Mapping[int, Any], x: Any, y: Any) -> Any:
            others = [drawn.get(place, value) for place, value in enumerate(carry[1])]
            return self.flat(self._gradient(carry[0], others, x[None], y[None])[1])

        def summed(carry: Any, drawn: Mapping[int, Any], x: Any, y: Any, there: Any, bound: Any, steps: Any) -> Any:
            gradients = jax.vmap(one, (None, 0, 0, 0))(carry, drawn, x, y)
            whole = by_row.whole(jnp, gradients, bound, steps).astype(jnp.int32)
            return jnp.sum(jnp.where(there[:, None], whole, 0), axis=0)

        return jax.jit(summed)

    def predict(self, carry: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """See `Engine.predict`."""
        predicted, losses = self._predict(carry[:2], *filled([x, y], max(len(x), _FILLED)))
        return np.asarray(predicted)[: len(x)], np.asarray(losses)[: len(x)].sum()

    @cached_property
    def _gradient(self) -> Any:
        def loss(trainable: Any, others: Any, x: Any, y: Any, mask: Any = None) -> Any:
            predicted, others, added = self._model.stateless_call(trainable, others, x, training=True, return_losses=True)
            down, summed = self._objective(y, predicted, mask)
            return down + sum(added), (others, summed)

        return jax.value_and_grad(loss, has_aux=True)

    @cached_property
    def _step(self) -> Any:
        return jax.jit(self.move)

    def move(self, carry: Any, x: Any, y: Any, mask: Any = None) -> Any:
        """Go one step, as a pure function that any compilation may hold; `mask` tells true rows from filling."""
        trainable, others, state = carry
        (_, (others, loss)), gradient = self._gradient(trainable, others, x, y, mask)
        trainable, state = self._optimizer.stateless_apply(state, gradient, trainable)
        return (trainable, others, state), loss

    def flat(self, arrays: Sequence[Any]) -> Any:
        """Return arrays as one flat vector."""
        return jnp.concatenate([jnp.ravel(array) for array in arrays])

    def judge(self, carry: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """Return what the model says of rows, and the loss of each."""
        predicted, _ = self._model.stateless_call(carry[0], carry[1], x, training=False)
        losses = jax.vmap(lambda y, said: self._objective(y[None], said[None], None)[1])(y, predicted)
        return predicted.astype(jnp.float32), losses

    def apart(self, carry: Any, x: Any) -> bool:
        """See `Pure.apart`."""
        half = len(x) // 2
        call = partial(self._model.stateless_call, training=True, return_losses=True)
        whole, part = (call(carry[0], carry[1], some) for some in (x, x[:half]))
        added = [np.asarray(sum(one[2]) if one[2] else 0.0) for one in (whole, part)]
        return alike(np.asarray(whole[0], np.float32)[:half], np.asarray(part[0], np.float32)) and alike(*added)

    @cached_property
    def _gradient_only(self) -> Any:
        return jax.jit(self._gradient)

    @cached_property
    def _predict(self) -> Any:
        return jax.jit(self.judge)
