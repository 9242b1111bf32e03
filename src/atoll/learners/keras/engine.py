"""What fits a Keras model, whichever backend Keras runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras

from atoll.errors import LearnerError
from atoll.learner import Correct
from atoll.vector import Layout

Objective = Callable[[Any, Any, Any], tuple[Any, Any]]
"""`objective(y, predicted, mask)`: the loss that is to go down, and the loss summed over the rows that a mask leaves."""


class Engine(Protocol):
    """A model that can be filled, stepped, asked and read."""

    def begin(self, trainable: Sequence[Any], others: Sequence[Any], rate: float, seed: int) -> Any:
        """Fill the model and make the optimiser fresh, at `rate` times its learning rate; return what is carried on.

        `seed` is for a backend's own generator; random state among `others` is seeded already.
        """
        ...

    def step(self, carry: Any, x: Any, y: Any, correct: Correct | None) -> tuple[Any, Any]:
        """Go one step; return what is carried on, and the loss summed over the rows."""
        ...

    def end(self, carry: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the trainable and the other variables."""
        ...

    def clipped(self, carry: Any, drawn: Mapping[int, Any], x: Any, y: Any, there: Any, bound: Any, steps: Any) -> Any:
        """Return the sum `[p]` of the gradients of the rows that are there, each a batch of its own, as `by_row.whole` makes it.

        `drawn` has each row's random state `[rows, …]`, by the place of the variable among the others.
        """
        ...

    def predict(self, carry: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """Return what the model says of rows, float32, and its loss summed over them."""
        ...


def make(model: Any, optimizer: Any, objective: Objective, layout: Layout) -> Engine:
    """Return the engine of Keras' backend.

    Args:
        model: the built model.
        optimizer: built for it.
        objective: what is fitted.
        layout: of the parameters.

    Raises:
        LearnerError: the backend only predicts.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        from atoll.learners.keras.stateless import Stateless

        return Stateless(model, optimizer, objective, layout)
    from atoll.learners.keras import eager

    if backend not in eager.BACKENDS:
        raise LearnerError(f"Keras' backend '{backend}' can't train; set KERAS_BACKEND to jax, tensorflow or torch")
    return eager.Eager(model, optimizer, objective, layout, eager.BACKENDS[backend]())
