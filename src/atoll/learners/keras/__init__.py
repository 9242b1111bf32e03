"""Keras 3 models, on JAX, TensorFlow or PyTorch: built from checked JSON, weights as flat groups.

The backend is JAX unless the environment's `KERAS_BACKEND` says another. `allowed.py` says what the JSON may hold,
`room.py` how large it may be; `learner.py` fits it, through the engine of its backend.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5py
import keras

from atoll.errors import LearnerError, PlanError
from atoll.learners.keras import allowed, room
from atoll.learners.keras.learner import LOSSES, OPTIMIZERS, Keras
from atoll.plan import Plan
from atoll.vector import Groups

OLDEST = (3, 13, 2)
_WEIGHTS = "model.weights.h5"
"""What the weights are called inside a `.keras` file."""
_WIDEST = 8
"""No number there takes more bytes."""


def build(plan: Plan) -> Keras:
    """Build the learner of `[model] keras`.

    Raises:
        PlanError: the JSON holds what isn't allowed, or loss or optimiser are not known.
        LearnerError: Keras is too old, can't build the model or can't train it, or it is too large for this machine.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", keras.__version__)[:3])
    if version < OLDEST:
        raise LearnerError(f"Keras {keras.__version__} has known holes; upgrade to {'.'.join(map(str, OLDEST))} or newer")
    model, training = plan.model, plan.training
    config = allowed.check(model.keras or {})
    allowed.options(model.options, "model.options")
    allowed.options(training.options, "training.options")
    for key, name, known in (
        ("model.loss", model.loss, LOSSES),
        ("training.optimizer", training.optimizer, OPTIMIZERS),
    ):
        if name not in known:
            raise PlanError(f"{key}: '{name}' is not known; it is one of {', '.join(known)}")
    size = room.check(config, training.batch_size)
    options = {"learning_rate": training.learning_rate, **training.options}
    return Keras(config, str(model.loss), model.options, training.optimizer, options, size.widest)


def export(plan: Plan, groups: Groups, path: Path) -> None:
    """Write a model as a `.keras` file, which Keras alone can load.

    Raises:
        LearnerError: it can't be written.
    """
    learner = build(plan)
    learner.load(groups)
    try:
        learner.model.save(path)
    except (OSError, ValueError) as error:
        raise LearnerError(f"{path}: the model can't be written ({error})") from error


def load(plan: Plan, path: Path) -> Groups:
    """Read the weights of a `.keras` file into the plan's own model: no config, no code, nothing else in the file is looked at.

    Raises:
        LearnerError: it is none, or its weights are not those of the plan's model.
    """
    learner = build(plan)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_WEIGHTS) as raw, h5py.File(raw) as file:
            held = _numbers_in(file)
        if held != (own := sum(layout.size for layout in learner.layouts.values())):
            raise LearnerError(f"it holds {held:,} weights, the plan's model has {own:,}")
        learner.model.load_weights(path)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise LearnerError(str(error)[:300]) from error
    return learner.groups()


def _numbers_in(file: Any) -> int:
    """Count what a weights file holds, before any of it is read; the optimiser's and generators' state are no weights."""
    sizes = []

    def count(name: str, held: Any) -> None:
        if isinstance(held, h5py.Dataset):
            if held.dtype.itemsize > _WIDEST:
                raise LearnerError(f"'{name}' holds {held.dtype} and not numbers")
            if not name.startswith("optimizer/") and "seed_generator" not in name:
                sizes.append(held.size)

    file.visititems(count)
    return sum(sizes)
