"""How large a Keras model is, told from its JSON before a single weight is made."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras

from atoll import memory
from atoll.errors import LearnerError

_BYTES = 4
TURN = threading.RLock()
"""Held while Keras builds a model: the names of weights and the seed are one for the whole process."""


class Size(NamedTuple):
    """How many weights a model has, and how many numbers its largest layer gives for one row."""

    weights: int
    widest: int


def measure(config: Mapping[str, Any]) -> Size:
    """Return a model's size; inside a stateless scope Keras gives weights a shape and no memory.

    Raises:
        LearnerError: Keras can't build it.
    """
    with TURN:
        keras.utils.clear_session(free_memory=False)
        try:
            with keras.StatelessScope(initialize_variables=False):
                model = keras.models.model_from_json(json.dumps(config))
                return Size(sum(math.prod(weight.shape) for weight in model.weights), max(_widths(model), default=1))
        except Exception as error:  # whatever Keras finds wrong in a config
            raise LearnerError(f"model.keras: Keras can't build it: {error}") from error
        finally:
            keras.utils.clear_session(free_memory=False)  # it would make the weights later


def check(config: Mapping[str, Any], batch_size: int) -> Size:
    """Return a model's size, if fitting it can fit into this machine: the weights and their gradient, and one layer of one batch.

    Raises:
        LearnerError: it can't, or Keras can't build it.
    """
    size = measure(config)
    memory.need(2 * size.weights * _BYTES, f"model.keras: {size.weights:,} weights and their gradient")
    wide = f"model.keras: layers of {size.widest:,} numbers a row, in batches of {batch_size} rows,"
    memory.need(size.widest * batch_size * _BYTES, wide)
    return size


def _widths(model: Any) -> Iterator[int]:
    for layer in getattr(model, "layers", ()):
        yield from _widths(layer)
        try:
            given = layer.output
        except (AttributeError, ValueError):  # used more than once, or inside of another: what holds it is looked at
            continue
        for tensor in given if isinstance(given, (list, tuple)) else [given]:
            yield math.prod(side or 1 for side in tensor.shape)
