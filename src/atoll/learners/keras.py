"""Keras 3 models on JAX: built from checked JSON, fitted by a compiled step, weights as flat groups.

`parameters` are the trainable weights; `buffers` the other ones of `model.weights` (batch-norm statistics, frozen
layers). The state of Keras' random generators travels in neither: each fit seeds it from its own generator.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5py
import jax
import jax.numpy as jnp
import keras

from atoll.errors import LearnerError, PlanError
from atoll.learner import Correct, Fit, Measure, Rows, batches, classified, nothing, regressed
from atoll.learners import keras_allowed
from atoll.plan import Plan
from atoll.vector import Flat, Group, Groups, Layout, Metrics, Tensor

OLDEST = (3, 13, 2)
_BINARY = ("binary_crossentropy", "binary_focal_crossentropy", "hinge", "squared_hinge")
_CLASSES = ("sparse_categorical_crossentropy",)
_NUMBERS = ("mean_squared_error", "mean_absolute_error", "huber", "log_cosh", "poisson")
LOSSES = (*_BINARY, *_CLASSES, *_NUMBERS)
OPTIMIZERS = ("sgd", "adam", "adamw", "adagrad", "rmsprop", "nadam", "adamax", "adadelta", "ftrl", "lion")
_ROWS = 4096
"""Rows judged at a time."""
_WEIGHTS = "model.weights.h5"
"""What the weights are called inside a `.keras` file."""


def build(plan: Plan) -> Keras:
    """Build the learner of `[model] keras`.

    Raises:
        PlanError: the JSON holds what isn't allowed, or loss or optimiser are not known.
        LearnerError: Keras is too old, runs on another backend, or can't build the model.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", keras.__version__)[:3])
    if version < OLDEST:
        raise LearnerError(f"Keras {keras.__version__} has known holes; upgrade to {'.'.join(map(str, OLDEST))} or newer")
    if keras.backend.backend() != "jax":
        raise LearnerError(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
    model = plan.model
    keras_allowed.check(model.keras or {})
    for key, name, known in (
        ("model.loss", model.loss, LOSSES),
        ("training.optimizer", plan.training.optimizer, OPTIMIZERS),
    ):
        if name not in known:
            raise PlanError(f"{key}: '{name}' is not known; it is one of {', '.join(known)}")
    return Keras(
        model.keras or {}, str(model.loss), model.options, plan.training.optimizer,
        {"learning_rate": plan.training.learning_rate, **plan.training.options},
    )  # fmt: skip


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
        if isinstance(held, h5py.Dataset) and not name.startswith("optimizer/") and "seed_generator" not in name:
            sizes.append(held.size)

    file.visititems(count)
    return sum(sizes)


class Keras:
    """A Keras model and how it is fitted.

    Args:
        config: what `model.to_json()` writes, parsed and checked.
        loss: the name of a Keras loss.
        loss_options: its options, for instance `from_logits`.
        optimizer: the name of a Keras optimiser; it starts anew in each fit.
        optimizer_options: its options.
    """

    can = frozenset({"correct"})
    measure: Measure = staticmethod(nothing)

    def __init__(
        self,
        config: Mapping[str, Any],
        loss: str,
        loss_options: Mapping[str, Any],
        optimizer: str,
        optimizer_options: Mapping[str, Any],
    ) -> None:
        self._config, self._loss_name = config, loss
        self.model = self._built(seed=0)
        try:
            kind = getattr(keras.losses, "".join(word.capitalize() for word in loss.split("_")))
            self._loss = kind(**{**loss_options, "reduction": "sum"})
            self._optimizer = keras.optimizers.get({"class_name": optimizer, "config": dict(optimizer_options)})
        except (TypeError, ValueError) as error:
            raise PlanError(f"model.options or training.options: {error}") from error
        self._logits = bool(loss_options.get("from_logits"))
        self._optimizer.build(self.model.trainable_variables)
        self._split = [weight for weight in self.model.weights if not weight.trainable]
        self.layouts = self._layouts()

    def _built(self, seed: int) -> Any:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed)
        try:
            model = keras.models.model_from_json(json.dumps(self._config))
        except Exception as error:  # whatever Keras finds wrong in a config
            raise LearnerError(f"model.keras: Keras can't build it: {error}") from error
        if not model.built:
            raise LearnerError("model.keras: the model has no input shape; start it with keras.Input(…)")
        return model

    def _layouts(self) -> dict[str, Layout]:
        for weight in self.model.weights:
            if weight.dtype != "float32":
                raise LearnerError(f"model.keras: '{weight.path}' is {weight.dtype}; weights travel as float32")
        names = {"parameters": self.model.trainable_variables, "buffers": self._split}
        return {
            name: Layout(tuple(Tensor(weight.path, tuple(weight.shape)) for weight in weights))
            for name, weights in names.items()
            if weights
        }

    def initial(self, seed: int) -> Groups:
        """Return a freshly initialised model."""
        model = self._built(seed)
        return self._groups(model.trainable_variables, [weight for weight in model.weights if not weight.trainable])

    def groups(self) -> Groups:
        """Return what is in the Keras model."""
        return self._groups(self.model.trainable_variables, self._split)

    def load(self, groups: Groups) -> None:
        """Put groups into the Keras model."""
        for name, weights in (("parameters", self.model.trainable_variables), ("buffers", self._split)):
            if weights:
                for weight, array in zip(weights, groups[name].arrays.values(), strict=True):
                    weight.assign(array)

    def _groups(self, trainable: Sequence[Any], others: Sequence[Any]) -> Groups:
        arrays = {"parameters": trainable, "buffers": others}
        return {
            name: Group(
                layout,
                layout.flatten({t.name: np.asarray(array) for t, array in zip(layout.tensors, arrays[name], strict=True)}),
            )
            for name, layout in self.layouts.items()
        }

    def _variables(self, groups: Groups, seeds: np.random.Generator | None) -> tuple[list[Any], list[Any]]:
        """Return trainable and other variables as arrays; those that are no weights (random state) by the generator."""
        trainable = [jnp.asarray(array) for array in groups["parameters"].arrays.values()]
        weights = iter(groups["buffers"].arrays.values() if "buffers" in groups else ())
        own = {id(weight) for weight in self._split}
        others = []
        for variable in self.model.non_trainable_variables:
            if id(variable) in own:
                others.append(jnp.asarray(next(weights)))
            elif seeds is not None and "seed" in variable.path:
                others.append(jnp.asarray(seeds.integers(0, 1 << 31, variable.shape), variable.dtype))
            else:
                others.append(jnp.asarray(variable.value))
        return trainable, others

    @cached_property
    def _gradient(self) -> Any:
        def loss(trainable: Any, others: Any, x: Any, y: Any) -> Any:
            predicted, others = self.model.stateless_call(trainable, others, x, training=True)
            extra = sum(self.model.losses) if self.model.losses else 0.0
            summed = self._loss(self._shaped(y, predicted), predicted)
            return summed / self._units(predicted) + extra, (others, summed / self._per_row(predicted))

        return jax.value_and_grad(loss, has_aux=True)

    @cached_property
    def _step(self) -> Any:
        def step(carry: Any, batch: Any, x: Any, y: Any) -> Any:
            trainable, others, optimizer = carry
            (_, (others, loss)), gradient = self._gradient(trainable, others, x[batch], y[batch])
            trainable, optimizer = self._optimizer.stateless_apply(optimizer, gradient, trainable)
            return (trainable, others, optimizer), loss

        return jax.jit(step)

    @cached_property
    def _gradient_only(self) -> Any:
        return jax.jit(lambda trainable, others, batch, x, y: self._gradient(trainable, others, x[batch], y[batch]))

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
    ) -> Fit:
        """See `Learner.fit`; a short last batch is a shape of its own, so that batch norm sees true rows only."""
        x, y = self._arrays(rows)
        trainable, others = self._variables(groups, rng)
        carry = (trainable, others, self._optimizer_state(rate))
        losses, samples = [], 0
        for batch in batches(rng, len(rows), batch_size, steps):
            if correct is None:
                carry, loss = self._step(carry, batch, x, y)
            else:
                carry, loss = self._corrected(carry, batch, x, y, correct)
            losses.append(loss)
            samples += len(batch)
        held = self._kept(carry[1])
        return Fit(self._groups(carry[0], held), {"samples": float(samples), "loss": float(np.sum(jax.device_get(losses)))})

    def _optimizer_state(self, rate: float) -> list[Any]:
        """Return a fresh optimiser's variables; its learning rate is one of them, so that another one compiles nothing anew."""
        learning_rate = self._optimizer.learning_rate
        return [jnp.asarray(v.value) * (rate if v is learning_rate else 1) for v in self._optimizer.variables]

    def _corrected(self, carry: Any, batch: NDArray[Any], x: Any, y: Any, correct: Correct) -> Any:
        trainable, others, optimizer = carry
        (_, (others, loss)), gradient = self._gradient_only(trainable, others, batch, x, y)
        layout = self.layouts["parameters"]
        flat = [np.concatenate([np.ravel(part) for part in parts]) for parts in (gradient, trainable)]
        mended: Flat = np.asarray(correct(flat[0], flat[1]), np.float32)
        gradient = [jnp.asarray(array) for array in layout.views(mended).values()]
        trainable, optimizer = self._optimizer.stateless_apply(optimizer, gradient, trainable)
        return (trainable, others, optimizer), loss

    def _kept(self, others: Sequence[Any]) -> list[Any]:
        own = {id(weight) for weight in self._split}
        return [value for variable, value in zip(self.model.non_trainable_variables, others, strict=True) if id(variable) in own]

    @cached_property
    def _predict(self) -> Any:
        def predict(trainable: Any, others: Any, x: Any, y: Any) -> Any:
            predicted, _ = self.model.stateless_call(trainable, others, x, training=False)
            return predicted, self._loss(self._shaped(y, predicted), predicted) / self._per_row(predicted)

        return jax.jit(predict)

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`."""
        x, y = self._arrays(rows)
        trainable, others = self._variables(groups, None)
        loss, predicted = 0.0, []
        for lo in range(0, len(rows), _ROWS):
            part, lost = self._predict(trainable, others, x[lo : lo + _ROWS], y[lo : lo + _ROWS])
            predicted.append(np.asarray(part))
            loss += float(lost)
        scores = np.concatenate(predicted)
        return {**self._judged(loss, scores, y), **self.measure(scores, y)}

    def _judged(self, loss: float, scores: NDArray[Any], y: NDArray[Any]) -> Metrics:
        if self._loss_name in _NUMBERS:
            return regressed(loss, scores.reshape(len(y), -1)[:, 0], y)
        if self._loss_name in _CLASSES:
            return classified(loss, scores.argmax(axis=-1).reshape(len(y)), y)
        threshold = 0.0 if self._logits or "hinge" in self._loss_name else 0.5
        return classified(loss, (scores.reshape(len(y)) >= threshold).astype(int), y)

    def _arrays(self, rows: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        wanted = tuple(self.model.input_shape[1:])
        if len(wanted) != rows.x.ndim - 1 or any(a not in (None, b) for a, b in zip(wanted, rows.x.shape[1:], strict=True)):
            raise LearnerError(f"rows of shape {rows.x.shape[1:]}: the plan's model takes {wanted}")
        kind = np.int32 if self._loss_name in _CLASSES else np.float32
        return np.asarray(rows.x, np.float32), np.asarray(rows.y, kind)

    def _shaped(self, y: Any, predicted: Any) -> Any:
        return y if self._loss_name in _CLASSES else jnp.reshape(y, predicted.shape)

    def _per_row(self, predicted: Any) -> float:
        """Keras sums the loss over all but the last axis; a row's loss is the mean over its outputs."""
        inner = predicted.shape[1:] if self._loss_name in _CLASSES else predicted.shape[1:-1]
        return float(np.prod(predicted.shape[1:-1])) if inner else 1.0

    def _units(self, predicted: Any) -> float:
        return self._per_row(predicted) * float(predicted.shape[0])
