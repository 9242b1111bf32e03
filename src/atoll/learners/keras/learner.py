"""A Keras model as a learner: its weights as flat groups, and the sums that judge it.

`parameters` are the trainable weights; `buffers` the other ones of `model.weights` (batch-norm statistics, frozen
layers). Whole numbers (counters) and the state of Keras' random generators travel in neither: the first begin each
fit as the model's JSON says, the second are seeded by the fit's own generator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np
from numpy.typing import NDArray

from atoll.errors import LearnerError, PlanError
from atoll.keys import new_secret
from atoll.learner import Correct, Fit, Lean, Measure, Pure, Rows, batches, nothing
from atoll.learners import by_row, named
from atoll.learners.keras import engine, room
from atoll.metrics import Count, Task
from atoll.vector import Group, Groups, Layout, Metrics, Tensor

if TYPE_CHECKING:
    from atoll.learners.keras.represented import Represented
    from atoll.learners.keras.stateless import Stateless

_BINARY = ("binary_crossentropy", "binary_focal_crossentropy", "hinge", "squared_hinge")
_CLASSES = ("sparse_categorical_crossentropy",)
_NUMBERS = ("mean_squared_error", "mean_absolute_error", "huber", "log_cosh", "poisson")
LOSSES = (*_BINARY, *_CLASSES, *_NUMBERS)
OPTIMIZERS = ("sgd", "adam", "adamw", "adagrad", "rmsprop", "nadam", "adamax", "adadelta", "ftrl", "lion")
_ROWS = 4096
"""At most so many rows are judged at a time, …"""
_NUMBERS_AT_ONCE = 1 << 26
"""… and fewer where a layer gives more numbers than this for them (256 MB)."""

_SIDE = 8
"""For a trial, of inputs that may have any size."""


class Keras:
    """A Keras model and how it is fitted.

    Args:
        config: what `model.to_json()` writes, parsed and checked.
        loss: the name of a Keras loss.
        loss_options: its options, for instance `from_logits`.
        optimizer: the name of a Keras optimiser; it starts anew in each fit.
        optimizer_options: its options.
        widest: how many numbers the largest layer gives for one row.
    """

    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(
        self,
        config: Mapping[str, Any],
        loss: str,
        loss_options: Mapping[str, Any],
        optimizer: str,
        optimizer_options: Mapping[str, Any],
        widest: int = 1,
    ) -> None:
        plain = optimizer == "sgd" and optimizer_options.keys() <= {"learning_rate"}
        self.can = frozenset({"correct", "per_example", *(["sgd"] if plain else [])})
        self._config, self._loss_name = config, loss
        self.task: Task = "numbers" if loss in _NUMBERS else "classes" if loss in _CLASSES else "binary"
        self.chances = "hinge" not in loss
        self._rows = max(1, min(_ROWS, _NUMBERS_AT_ONCE // widest))
        self.model = self._built(seed=0)
        try:
            kind = getattr(keras.losses, "".join(word.capitalize() for word in loss.split("_")))
            self._loss = kind(**{**loss_options, "reduction": "sum"})
            made = keras.optimizers.get({"class_name": optimizer, "config": dict(optimizer_options)})
        except (TypeError, ValueError) as error:
            raise PlanError(f"model.options or training.options: {error}") from error
        self._logits = bool(loss_options.get("from_logits"))
        made.build(self.model.trainable_variables)
        self._home = [_array(variable.value) for variable in self.model.non_trainable_variables]
        self.layouts = self._layouts()
        self._engine = engine.make(self.model, made, self._objective, self.layouts["parameters"])
        if hasattr(self._engine, "move"):
            self.can |= {"scan", "vmap", "represent"}
        self._layers: dict[str | None, Represented] = {}

    def _built(self, seed: int) -> Any:
        with room.TURN:
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
        names = {"parameters": self.model.trainable_variables, "buffers": _buffers(self.model)}
        for weight in (*names["parameters"], *names["buffers"]):
            if weight.dtype != "float32":
                mend = "for mixed precision use the dtype policy mixed_bfloat16"
                raise LearnerError(f"model.keras: '{weight.path}' is {weight.dtype}; weights travel as float32: {mend}")
        if not names["parameters"]:
            raise LearnerError("model.keras: the model has no weights to train")
        return {
            name: Layout(tuple(Tensor(weight.path, tuple(weight.shape)) for weight in weights))
            for name, weights in names.items()
            if weights
        }

    def initial(self, seed: int) -> Groups:
        """Return a freshly initialised model."""
        return self._groups_in(self._built(seed))

    def groups(self) -> Groups:
        """Return what is in the Keras model."""
        return self._groups_in(self.model)

    def load(self, groups: Groups) -> None:
        """Put groups into the Keras model."""
        for name, weights in (("parameters", self.model.trainable_variables), ("buffers", _buffers(self.model))):
            if weights:
                for weight, array in zip(weights, groups[name].arrays.values(), strict=True):
                    weight.assign(array)

    def _groups_in(self, model: Any) -> Groups:
        trainable, buffers = ([one.value for one in weights] for weights in (model.trainable_variables, _buffers(model)))
        return self._groups(trainable, buffers)

    def _groups(self, trainable: Sequence[Any], buffers: Sequence[Any]) -> Groups:
        values = {"parameters": trainable, "buffers": buffers}
        return {
            name: Group(
                layout, layout.flatten({t.name: _array(one) for t, one in zip(layout.tensors, values[name], strict=True)})
            )
            for name, layout in self.layouts.items()
        }

    def _filled(self, groups: Groups, seeds: np.random.Generator | None, rate: float = 1.0) -> Any:
        """Begin with groups; variables that are no weights (random state) get the generator's numbers."""
        drawn = self._draws(seeds) if seeds is not None else ()
        others = self._others(groups["buffers"].values if "buffers" in groups else None, drawn)
        seed = int(seeds.spawn(1)[0].integers(1 << 31)) if seeds is not None else 0
        return self._engine.begin(list(groups["parameters"].arrays.values()), others, rate, seed)

    def _draws(self, rng: np.random.Generator) -> list[NDArray[Any]]:
        """Draw the random state of a fit."""
        homes = zip(self.model.non_trainable_variables, self._home, strict=True)
        return [rng.integers(0, 1 << 31, home.shape).astype(home.dtype) for one, home in homes if self._is_random(one)]

    def _is_random(self, variable: Any) -> bool:
        return "seed" in variable.path and all(variable is not weight for weight in self.model.weights)

    def _others(self, buffers: Any, drawn: Sequence[Any]) -> list[Any]:
        """Return the variables that are not trained: what travels, what was drawn, and what begins as the JSON says."""
        travels = {id(one) for one in _buffers(self.model)}
        held = iter(self.layouts["buffers"].views(buffers).values() if buffers is not None else ())
        left = iter(drawn)
        return [
            next(held) if id(one) in travels else next(left) if drawn and self._is_random(one) else home
            for one, home in zip(self.model.non_trainable_variables, self._home, strict=True)
        ]

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
        lean: Lean | None = None,
    ) -> Fit:
        """See `Learner.fit`; a short last batch is a shape of its own, so that batch norm sees true rows only.

        Rows are taken out of `x` by batches, so one that is mapped from a file never comes into memory whole.
        """
        self._check(rows)
        carry = self._filled(groups, rng, rate)
        losses, samples = [], 0
        for batch in batches(rng, len(rows), batch_size, steps):
            x, y = self._arrays(rows, batch)
            if lean is None:
                carry, loss = self._engine.step(carry, x, y, correct)
            else:
                gradient = self._represented(lean.layer).gradient(carry, x, y, lean.slope)
                carry, loss = cast("Stateless", self._engine).apply(carry, gradient, correct)
            losses.append(loss)
            samples += len(batch)
        trainable, others = self._engine.end(carry)
        return Fit(
            self._groups(trainable, self._travelling(others)), {"samples": float(samples), "loss": float(sum(map(float, losses)))}
        )

    @cached_property
    def moving(self) -> tuple[str, ...]:
        """See `PerExample.moving`: found by trying a step."""
        if "buffers" not in self.layouts:
            return ()
        names = [tensor.name for tensor in self.layouts["buffers"].tensors]
        model, inner = self.model, self._loss_name in _CLASSES
        shapes = model.input_shape[1:], model.output_shape[1:-1] if inner else model.output_shape[1:]
        x, y = (np.ones((2, *(side or _SIDE for side in shape)), np.float32) for shape in shapes)
        start = self.groups()["buffers"].arrays
        try:
            after = self.fit(self.groups(), Rows(x, np.zeros_like(y)), 1, 2, np.random.default_rng(0)).groups["buffers"].arrays
        except Exception:  # noqa: BLE001  a model that takes no such rows: it may change anything
            return tuple(names)
        return tuple(name for name in names if not np.array_equal(start[name], after[name]))

    def clipped(self, groups: Groups, rows: Rows, bound: float, steps: int) -> NDArray[np.float64]:
        """See `PerExample.clipped`."""
        self._check(rows)
        size, rng = self.layouts["parameters"].size, np.random.default_rng(int.from_bytes(new_secret(), "little"))
        total, carry = np.zeros(size), self._filled(groups, rng)
        for which, there in by_row.filled(size, len(rows)):
            drawn = {
                place: rng.integers(0, 1 << 31, (len(which), *home.shape)).astype(home.dtype)
                for place, (one, home) in enumerate(zip(self.model.non_trainable_variables, self._home, strict=True))
                if self._is_random(one)
            }
            found = self._engine.clipped(carry, drawn, *self._arrays(rows, which), there, np.float32(bound), np.float32(steps))
            total += _array(found)
        return total

    def represent(self, groups: Groups, layer: str | None) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """See `Representing.represent`; on JAX alone."""
        carry, model = self._filled(groups, None), self._represented(layer)
        return lambda x: cast("NDArray[Any]", model.represent(carry, x))

    def _represented(self, layer: str | None) -> Represented:
        from atoll.learners.keras.represented import Represented

        if layer not in self._layers:
            self._layers[layer] = Represented(self.model, self._objective, layer)
        return self._layers[layer]

    def _travelling(self, others: Sequence[Any]) -> list[Any]:
        travels = {id(one) for one in _buffers(self.model)}
        return [value for one, value in zip(self.model.non_trainable_variables, others, strict=True) if id(one) in travels]

    def pure(self) -> Pure:
        """See `Compiled.pure`; on JAX alone (`vmap` in `can`)."""
        engine, layouts = cast("Stateless", self._engine), self.layouts

        def own(rng: np.random.Generator, rate: float) -> tuple[NDArray[Any], ...]:
            return np.asarray(rate, np.float32), *self._draws(rng)

        def begin(flats: dict[str, Any], own: Any) -> Any:
            others = self._others(flats.get("buffers"), own[1:])
            return engine.begin(list(layouts["parameters"].views(flats["parameters"]).values()), others, own[0], 0)

        def step(carry: Any, own: Any, x: Any, y: Any, mask: Any, number: Any) -> tuple[Any, Any]:
            del own, number
            moved: tuple[Any, Any] = engine.move(carry, x, y, mask)
            return moved

        def end(carry: Any) -> dict[str, Any]:
            arrays = {"parameters": carry[0], "buffers": self._travelling(carry[1])}
            return {name: engine.flat(arrays[name]) for name in layouts}

        def judge(flats: dict[str, Any], x: Any, y: Any) -> tuple[Any, Any]:
            return engine.judge(begin(flats, (1.0,)), x, y)

        def apart(x: NDArray[Any]) -> bool:
            random = np.random.default_rng(0)
            flats = {name: random.standard_normal(layout.size).astype(np.float32) for name, layout in layouts.items()}
            return not self._home and engine.apart(begin(flats, (1.0,)), x)

        return Pure(
            own, self._arrays, begin, step, end, judge,
            lambda outputs, losses, y: self._judged(float(losses.sum()), outputs, y), apart,
        )  # fmt: skip

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`."""
        self._check(rows)
        carry = self._filled(groups, None)
        loss, predicted = 0.0, []
        for lo in range(0, len(rows), self._rows):
            part, lost = self._engine.predict(carry, *self._arrays(rows, slice(lo, lo + self._rows)))
            predicted.append(_array(part))
            loss += float(lost)
        return self._judged(loss, np.concatenate(predicted), np.asarray(rows.y))

    def _judged(self, loss: float, outputs: NDArray[Any], y: NDArray[Any]) -> Metrics:
        scores = np.asarray(outputs, np.float64)
        if self.task == "classes":
            scores = scores.reshape(*y.shape, scores.shape[-1])
        if self.chances and not self._logits and self.task != "numbers":
            with np.errstate(divide="ignore", invalid="ignore"):  # chances of 0 and 1
                scores = np.log(scores) - np.log1p(-scores) if self.task == "binary" else np.log(scores)
        return {**named.judged(self.task, loss, scores, y, self.count), **self.measure(outputs, y)}

    def _check(self, rows: Rows) -> None:
        wanted = tuple(self.model.input_shape[1:])
        if len(wanted) != rows.x.ndim - 1 or any(a not in (None, b) for a, b in zip(wanted, rows.x.shape[1:], strict=True)):
            raise LearnerError(f"rows of shape {rows.x.shape[1:]}: the plan's model takes {wanted}")

    def _arrays(self, rows: Rows, which: NDArray[np.intp] | slice) -> tuple[NDArray[Any], NDArray[Any]]:
        kind = np.int32 if self._loss_name in _CLASSES else np.float32
        return np.asarray(rows.x[which], np.float32), np.asarray(rows.y[which], kind)

    def _objective(self, y: Any, predicted: Any, mask: Any) -> tuple[Any, Any]:
        """Return the mean loss over rows, and their sum; a mask `[rows]` of 1 and 0 leaves rows out of both.

        Keras sums the loss over all but the last axis; a row's loss is the mean over its outputs. Of classes at each of many
        places, those below 0 are no target and count nowhere.
        """
        classes = self._loss_name in _CLASSES
        inner = tuple(predicted.shape[1:-1])
        weights = None if mask is None else keras.ops.reshape(mask, (-1,) + (1,) * len(inner))
        true = y if classes else keras.ops.reshape(y, predicted.shape)
        if classes and inner:
            there = keras.ops.cast(y >= 0, "float32")
            there = there / keras.ops.maximum(1.0, keras.ops.sum(there, axis=1, keepdims=True))
            true, weights = keras.ops.maximum(y, 0), there if weights is None else there * weights
            inner = ()
        summed = self._loss(true, predicted, sample_weight=weights) / float(np.prod(inner))
        return summed / (float(predicted.shape[0]) if mask is None else keras.ops.sum(mask)), summed


def _buffers(model: Any) -> list[Any]:
    """The weights that travel beside the trainable ones; whole numbers stay."""
    return [weight for weight in model.weights if not weight.trainable and "int" not in weight.dtype]


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(keras.ops.convert_to_numpy(value))
