"""Fitting on TensorFlow or PyTorch, where Keras has no stateless optimisers: the model itself is filled and stepped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np

from atoll.learner import Correct
from atoll.learners import by_row
from atoll.learners.keras.engine import Objective
from atoll.vector import Layout

_LOG = logging.getLogger("atoll.learners")
Function = Callable[..., Any]


class Backend(NamedTuple):
    """What differs.

    Args:
        gradient: (loss, values) → the gradient of `loss()[0]` by the values, and `loss()[1]`.
        compiled: makes a function of arrays faster.
        asking: the same for one that is never differentiated.
        each: (loss, values, parts) → the gradients `[rows, p]` of `loss(values, *part)` by the values, of a row's part of each.
        alone: the same one after the other, of what `each` can't take.
        seed: seeds the framework's own generator, from which some layers draw whatever seeds Keras keeps for them.
    """

    gradient: Callable[[Function, Callable[[], Sequence[Any]]], tuple[Sequence[Any], Any]]
    compiled: Callable[[Function], Function]
    asking: Callable[[Function], Function]
    each: Callable[[Function, Sequence[Any], tuple[Any, ...]], Any]
    alone: Callable[[Function, Sequence[Any], tuple[Any, ...]], Any]
    seed: Callable[[int], Any]


def _tensorflow() -> Backend:
    import tensorflow as tf

    def gradient(loss: Function, values: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Any]:
        with tf.GradientTape() as tape:
            down, summed = loss()
        return tape.gradient(down, values(), unconnected_gradients="zero"), summed

    def row(loss: Function, values: Sequence[Any]) -> Function:
        def one(part: tuple[Any, ...]) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(values)
                down = loss(values, *part)
            found = tape.gradient(down, values, unconnected_gradients="zero")
            return tf.concat([tf.reshape(tf.convert_to_tensor(one), [-1]) for one in found], 0)

        return one

    def each(loss: Function, values: Sequence[Any], parts: tuple[Any, ...]) -> Any:
        return tf.vectorized_map(row(loss, values), parts, fallback_to_while_loop=False)

    def alone(loss: Function, values: Sequence[Any], parts: tuple[Any, ...]) -> Any:
        return tf.map_fn(row(loss, values), parts, fn_output_signature=tf.float32)

    return Backend(gradient, tf.function, tf.function, each, alone, tf.random.set_seed)


def _torch() -> Backend:
    import torch

    def gradient(loss: Function, values: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Any]:
        down, summed = loss()
        found = torch.autograd.grad(down, values(), allow_unused=True)
        zeros = (torch.zeros_like(value) if part is None else part for part, value in zip(found, values(), strict=True))
        return list(zeros), summed.detach()

    def flat(found: Sequence[Any]) -> Any:
        return torch.cat([one.reshape(len(one), -1) for one in found], dim=1)

    def each(loss: Function, values: Sequence[Any], parts: tuple[Any, ...]) -> Any:
        places = (None, *(0 for _ in parts))
        return flat(torch.func.vmap(torch.func.grad(loss), places, randomness="different")(values, *parts))

    def alone(loss: Function, values: Sequence[Any], parts: tuple[Any, ...]) -> Any:
        drawn, x, y = parts
        down = torch.func.grad(loss)
        rows = [down(values, {place: many[k] for place, many in drawn.items()}, x[k], y[k]) for k in range(len(x))]
        return flat([torch.stack(many) for many in zip(*rows, strict=True)])

    return Backend(gradient, lambda act: act, torch.no_grad(), each, alone, torch.manual_seed)


BACKENDS: dict[str, Callable[[], Backend]] = {"tensorflow": _tensorflow, "torch": _torch}


class Eager:
    """A Keras model that is stepped in place; see `Engine`."""

    def __init__(self, model: Any, optimizer: Any, objective: Objective, layout: Layout, backend: Backend) -> None:
        self._model, self._optimizer, self._objective, self._layout, self._backend = model, optimizer, objective, layout, backend
        self._fresh = [keras.ops.convert_to_numpy(one.value) for one in optimizer.variables]
        self._gradient, self._step = backend.compiled(self._differentiate), backend.compiled(self._go)
        self._predict = backend.asking(self._judge)
        self._clipped, self._alone = (backend.compiled(partial(self._summed, how)) for how in (backend.each, backend.alone))

    def begin(self, trainable: Sequence[Any], others: Sequence[Any], rate: float, seed: int) -> None:
        """See `Engine.begin`."""
        self._backend.seed(seed)
        speed = self._optimizer.learning_rate
        for variables, values in (
            (self._model.trainable_variables, trainable),
            (self._model.non_trainable_variables, others),
            (self._optimizer.variables, self._fresh),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value * rate if variable is speed else value)

    def step(self, carry: None, x: Any, y: Any, correct: Correct | None) -> tuple[None, Any]:
        """See `Engine.step`."""
        if correct is None:
            return carry, self._step(x, y)
        gradient, loss = self._gradient(x, y)
        flat = [np.concatenate([_array(one).ravel() for one in part]) for part in (gradient, self._values())]
        mended = np.asarray(correct(flat[0], flat[1]), np.float32)
        self._apply([keras.ops.convert_to_tensor(array) for array in self._layout.views(mended).values()])
        return carry, loss

    def end(self, carry: None) -> tuple[list[Any], list[Any]]:
        """See `Engine.end`."""
        del carry
        return [_array(one) for one in self._values()], [_array(one.value) for one in self._model.non_trainable_variables]

    def clipped(self, carry: None, drawn: Mapping[int, Any], x: Any, y: Any, there: Any, bound: Any, steps: Any) -> Any:
        """See `Engine.clipped`; side by side where the framework can."""
        del carry
        given = [keras.ops.convert_to_tensor(one) for one in (x, y, there, bound, steps)]
        seeds = {place: keras.ops.convert_to_tensor(many) for place, many in drawn.items()}
        try:
            return self._clipped(seeds, *given)
        except Exception as error:  # whatever can't be vectorised; if it is the rows' fault, the slow way says so
            if self._clipped is self._alone:
                raise
            found = self._alone(seeds, *given)
            self._clipped = self._alone
            _LOG.warning(
                "privacy.example_noise: %s can't vectorise this model (%s), so rows go one by one",
                keras.backend.backend(),
                type(error).__name__,
            )
            return found

    def _summed(self, how: Function, drawn: Mapping[int, Any], x: Any, y: Any, there: Any, bound: Any, steps: Any) -> Any:
        held = [variable.value for variable in self._model.non_trainable_variables]

        def loss(values: Sequence[Any], drawn: Mapping[int, Any], x: Any, y: Any) -> Any:
            others = [drawn.get(place, value) for place, value in enumerate(held)]
            predicted, _, added = self._model.stateless_call(values, others, x[None], training=True, return_losses=True)
            return self._objective(y[None], predicted, None)[0] + sum(added)

        gradients = how(loss, self._values(), (dict(drawn), x, y))
        counts = keras.ops.cast(there, "int32")[:, None]
        return keras.ops.sum(keras.ops.cast(by_row.whole(keras.ops, gradients, bound, steps), "int32") * counts, axis=0)

    def predict(self, carry: None, x: Any, y: Any) -> tuple[Any, Any]:
        """See `Engine.predict`."""
        del carry
        predicted, loss = self._predict(x, y)
        return _array(predicted), loss

    def _values(self) -> list[Any]:
        return [variable.value for variable in self._model.trainable_variables]

    def _loss(self, x: Any, y: Any) -> tuple[Any, Any]:
        predicted = self._model(x, training=True)
        down, summed = self._objective(y, predicted, None)
        return down + sum(self._model.losses), summed

    def _differentiate(self, x: Any, y: Any) -> tuple[Sequence[Any], Any]:
        return self._backend.gradient(lambda: self._loss(x, y), self._values)

    def _apply(self, gradient: Sequence[Any]) -> None:
        self._optimizer.apply(gradient, self._model.trainable_variables)

    def _go(self, x: Any, y: Any) -> Any:
        gradient, loss = self._differentiate(x, y)
        self._apply(gradient)
        return loss

    def _judge(self, x: Any, y: Any) -> tuple[Any, Any]:
        predicted = self._model(x, training=False)
        return keras.ops.cast(predicted, "float32"), self._objective(y, predicted, None)[1]


def _array(value: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(value))
