"""A Keras model on JAX that also gives what one of its layers makes of each row; and the steps that lean on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from atoll.errors import PlanError
from atoll.learners.keras.engine import Objective


class Represented:
    """The same layers and variables, with a layer's output beside the model's.

    Args:
        model: the built model.
        objective: what is fitted.
        layer: the layer's name; None for what the last layer with weights takes.

    Raises:
        PlanError: there is no such layer.
    """

    def __init__(self, model: Any, objective: Objective, layer: str | None) -> None:
        self._both, self._objective = keras.Model(model.inputs, [model.outputs[0], _output(model, layer)]), objective
        self._trained = _places(self._both.trainable_variables, model.trainable_variables)
        self._others = _places(self._both.non_trainable_variables, model.non_trainable_variables)

    def _call(self, trainable: Sequence[Any], others: Sequence[Any], x: Any, *, training: bool) -> tuple[Any, Any, Any, Any]:
        """Return what the model says of rows, their representations, its other variables and the layers' own losses."""
        (predicted, seen), after, added = self._both.stateless_call(
            [trainable[k] for k in self._trained], [others[k] for k in self._others], x, training=training, return_losses=True
        )
        others = list(others)
        for place, value in zip(self._others, after, strict=True):
            others[place] = value
        return predicted, jnp.reshape(seen, (len(x), -1)).astype(jnp.float32), others, sum(added)

    def gradient(self, carry: Any, x: Any, y: Any, slope: Callable[[Any, Any], Any]) -> Any:
        """Return `(others, loss summed)` and the gradient of the model's loss and a further one, known by its slope."""
        seen = np.asarray(self._seen(carry[0], carry[1], x, training=True))
        return self._gradient(carry[0], carry[1], x, y, slope(x, seen))

    def represent(self, carry: Any, x: Any) -> Any:
        """Return representations `[rows, width]`, as rows are judged."""
        return np.asarray(self._seen(carry[0], carry[1], x, training=False))

    @cached_property
    def _seen(self) -> Any:
        return jax.jit(lambda *given, training: self._call(*given, training=training)[1], static_argnames="training")

    @cached_property
    def _gradient(self) -> Any:
        def loss(trainable: Any, others: Any, x: Any, y: Any, slope: Any) -> Any:
            predicted, seen, others, added = self._call(trainable, others, x, training=True)
            down, summed = self._objective(y, predicted, None)
            return down + added + jnp.sum(slope * seen), (others, summed)

        def act(*given: Any) -> Any:
            (_, kept), gradient = jax.value_and_grad(loss, has_aux=True)(*given)
            return kept, gradient

        return jax.jit(act)


def _output(model: Any, name: str | None) -> Any:
    """Return the tensor that stands for a row."""
    said = "aggregation.options.layer:"
    names = [layer.name for layer in model.layers]
    if name is None:
        taken = next(layer for layer in reversed(model.layers) if layer.weights).input
        if any(taken is one for one in model.inputs):
            raise PlanError(f"{said} the model has one layer with weights, so none that represents a row; name a deeper model")
        return taken
    if name not in names:
        raise PlanError(f"{said} the model has no layer '{name}'; it has {', '.join(names[:20])}")
    try:
        return model.get_layer(name).output
    except (AttributeError, ValueError) as error:
        raise PlanError(f"{said} '{name}' has no one output: {str(error).splitlines()[0]}") from error


def _places(some: Sequence[Any], all_: Sequence[Any]) -> list[int]:
    places = {id(variable): place for place, variable in enumerate(all_)}
    return [places[id(variable)] for variable in some]
