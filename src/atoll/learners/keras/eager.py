"""Fitting on TensorFlow or PyTorch, where Keras has no stateless optimisers: the model itself is filled and stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from atoll.learner import Correct
from atoll.learners.keras.engine import Objective
from atoll.vector import Layout

Function = Callable[..., Any]


class Backend(NamedTuple):
    """What differs.

    Args:
        gradient: (loss, values) → the gradient of `loss()[0]` by the values, and `loss()[1]`.
        compiled: makes a function of arrays faster.
        asking: the same for one that is never differentiated.
        seed: seeds the framework's own generator, from which some layers draw whatever seeds Keras keeps for them.
    """

    gradient: Callable[[Function, Callable[[], Sequence[Any]]], tuple[Sequence[Any], Any]]
    compiled: Callable[[Function], Function]
    asking: Callable[[Function], Function]
    seed: Callable[[int], Any]


def _tensorflow() -> Backend:
    import tensorflow as tf

    def gradient(loss: Function, values: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Any]:
        with tf.GradientTape() as tape:
            down, summed = loss()
        return tape.gradient(down, values(), unconnected_gradients="zero"), summed

    return Backend(gradient, tf.function, tf.function, tf.random.set_seed)


def _torch() -> Backend:
    import torch

    def gradient(loss: Function, values: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Any]:
        down, summed = loss()
        found = torch.autograd.grad(down, values(), allow_unused=True)
        zeros = (torch.zeros_like(value) if part is None else part for part, value in zip(found, values(), strict=True))
        return list(zeros), summed.detach()

    return Backend(gradient, lambda act: act, torch.no_grad(), torch.manual_seed)


BACKENDS: dict[str, Callable[[], Backend]] = {"tensorflow": _tensorflow, "torch": _torch}


class Eager:
    """A Keras model that is stepped in place; see `Engine`."""

    def __init__(self, model: Any, optimizer: Any, objective: Objective, layout: Layout, backend: Backend) -> None:
        self._model, self._optimizer, self._objective, self._layout, self._backend = model, optimizer, objective, layout, backend
        self._fresh = [keras.ops.convert_to_numpy(one.value) for one in optimizer.variables]
        self._gradient, self._step = backend.compiled(self._differentiate), backend.compiled(self._go)
        self._predict = backend.asking(self._judge)

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
