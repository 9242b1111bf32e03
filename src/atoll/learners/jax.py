"""Plain JAX functions: a model is a small value of them, its pytrees travel as flat groups, optax takes the steps.

`parameters` are the leaves of the pytree that is trained; a stateful model's other pytree gives `buffers` (float32) and
`counts` (whole numbers). Keys of random numbers travel in no group: each fit draws its own from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from atoll.errors import LearnerError, PlanError
from atoll.keys import new_secret
from atoll.learner import Correct, Fit, Lean, Measure, Pure, Rows, batches, filled, nothing
from atoll.learners import by_row, named
from atoll.metrics import Count, Task
from atoll.plan import Plan
from atoll.vector import Flat, Group, Groups, Layout, Metrics

Tree = Any
"""A pytree of arrays."""

LOSSES: Mapping[str, tuple[Task, Callable[[Any, Any], Any]]] = {
    "softmax_cross_entropy_with_integer_labels": ("classes", optax.softmax_cross_entropy_with_integer_labels),
    "sigmoid_binary_cross_entropy": ("binary", optax.sigmoid_binary_cross_entropy),
    "squared_error": ("numbers", optax.squared_error),
    "huber_loss": ("numbers", optax.huber_loss),
    "log_cosh": ("numbers", optax.log_cosh),
}
OPTIMIZERS = ("sgd", "adam", "adamw", "adagrad", "adadelta", "adamax", "lamb", "lion", "nadam", "radam", "rmsprop")
_ROWS = 4096
"""Rows judged at a time."""


class Model(NamedTuple):
    """What the function that a plan names returns: pure functions, none of them compiled yet.

    Args:
        init: `(key) -> parameters`, a pytree of float32 arrays; of a stateful model `(key) -> (parameters, state)`.
        apply: `(parameters, x, key, training) -> outputs`; of a stateful model
            `(parameters, state, x, key, training) -> (outputs, state)`. `training` is a Python bool.
        loss: `(outputs, y) -> losses [rows]`; or None, where the plan names one of `LOSSES`.
        stateful: whether there is a state: what training changes and no gradient does, such as batch-norm statistics.
        represent: as `apply`, but for what stands for each row, `[rows, width]`, and no state after it: MOON compares that.
    """

    init: Callable[[Any], Tree]
    apply: Callable[..., Any]
    loss: Callable[[Any, Any], Any] | None = None
    stateful: bool = False
    represent: Callable[..., Any] | None = None


def build(plan: Plan, function: Callable[..., Any]) -> Jax:
    """Build the learner of `[model] jax = "package:function"`; `model.options` are the function's keywords.

    Raises:
        PlanError: the function returns no `Model`, or loss or optimiser are not known.
        LearnerError: its arrays can't travel.
    """
    model = named.make("model.jax", str(plan.model.jax), function, plan.model.options)
    if not isinstance(model, Model):
        raise PlanError(f"model.jax: '{plan.model.jax}' returned a {type(model).__name__}: it returns atoll.learners.jax.Model")
    if (model.loss is None) == (plan.model.loss is None):
        said = "name one in the plan" if model.loss is None else "the model brings its own: leave it out of the plan"
        raise PlanError(f"model.loss: {said} ({', '.join(LOSSES)})")
    training = plan.training
    for key, name, known in (
        ("model.loss", plan.model.loss, [None, *LOSSES]),
        ("training.optimizer", training.optimizer, OPTIMIZERS),
    ):
        if name not in known:
            raise PlanError(f"{key}: '{name}' is not known; it is one of {', '.join(filter(None, known))}")

    def optimizer(learning_rate: Any) -> Any:
        return getattr(optax, training.optimizer)(learning_rate, **training.options)

    try:
        optimizer(training.learning_rate)
    except (TypeError, ValueError) as error:
        raise PlanError(f"training.options: {error}") from error
    task, loss = (None, model.loss) if plan.model.loss is None else LOSSES[plan.model.loss]
    plain = training.optimizer == "sgd" and not training.options
    return Jax(model, task, loss, optimizer, training.learning_rate, training.precision, plain=plain)


class Jax:
    """A model of plain JAX functions and how it is fitted.

    Args:
        model: the functions.
        task: what its outputs stand for, if that is known.
        loss: `(outputs, y) -> losses`, of one or more numbers a row.
        optimizer: `(learning_rate) -> optax.GradientTransformation`; its state starts anew in each fit.
        learning_rate: what it is given.
        precision: of the arithmetic of training; parameters and their steps stay float32.
        plain: whether the optimiser is SGD and no more.
    """

    chances = True
    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(
        self,
        model: Model,
        task: Task | None,
        loss: Any,
        optimizer: Callable[[Any], Any],
        learning_rate: float,
        precision: str,
        *,
        plain: bool = False,
    ) -> None:
        self.can = frozenset({"correct", "scan", "vmap", "per_example", *(["sgd"] if plain else [])})
        if model.represent is not None:
            self.can |= {"represent"}
        self._model, self.task, self._loss = model, task, loss
        self._optimizer, self._learning_rate = optimizer, learning_rate
        self._dtype = jnp.dtype(precision)
        # Shapes alone: nothing is computed.
        self._forms: tuple[Tree, Tree] = jax.eval_shape(self._init, jax.random.key(0))
        self._names = tuple(list(_leaves(tree)) for tree in self._forms)
        self.layouts = _layouts(self._forms)
        self.moving = self._names[1]

    def _init(self, key: Any) -> tuple[Tree, Tree]:
        made = self._model.init(key)
        return made if self._model.stateful else (made, {})

    def _apply(self, parameters: Tree, state: Tree, x: Any, key: Any, training: bool) -> tuple[Any, Tree]:
        if self._model.stateful:
            outputs, after = self._model.apply(parameters, state, x, key, training)
            # What was computed at low precision goes on at the state's own.
            return outputs, jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), state, after)
        return self._model.apply(parameters, x, key, training), state

    def initial(self, seed: int) -> Groups:
        """Return a freshly initialised model.

        Raises:
            LearnerError: `init` made another model than the first time.
        """
        made = self._init(jax.random.key(seed))
        named.same("model.jax", _layouts(made), self.layouts)
        return self._groups(*made)

    def _groups(self, parameters: Tree, state: Tree) -> Groups:
        arrays = _leaves(parameters) | _leaves(state)
        return {
            group: Group(layout, layout.flatten({tensor.name: np.asarray(arrays[tensor.name]) for tensor in layout.tensors}))
            for group, layout in self.layouts.items()
        }

    def _trees(self, flats: Mapping[str, Flat]) -> tuple[Tree, Tree]:
        arrays = {name: array for group, layout in self.layouts.items() for name, array in layout.views(flats[group]).items()}
        parameters, state = (
            jax.tree.unflatten(jax.tree.structure(forms), [
                jnp.array(arrays[name], form.dtype) for name, form in zip(names, jax.tree.leaves(forms), strict=True)
            ])
            for forms, names in zip(self._forms, self._names, strict=True)
        )  # fmt: skip
        return parameters, state

    def _losses(self, outputs: Any, y: Any) -> Any:
        """Return the loss of each row `[rows]`: the mean over its outputs, those without a target (classes below 0) left out."""
        outputs = jnp.asarray(outputs, jnp.float32)
        shaped = y if self.task in (None, "classes") else jnp.reshape(y, outputs.shape)
        if self.task == "classes" and y.ndim > 1:
            there = y >= 0
            losses = jnp.where(there, self._loss(outputs, jnp.maximum(y, 0)), 0)
            return jnp.sum(losses, axis=1) / jnp.maximum(1, jnp.sum(there, axis=1))
        losses = self._loss(outputs, shaped)
        return jnp.mean(jnp.reshape(losses, (len(y), -1)), axis=1)

    def _down(self, parameters: Tree, state: Tree, x: Any, y: Any, key: Any, step: Any, mask: Any = None) -> Any:
        """Return the mean loss of a mini-batch, the state after it, and the losses' sum."""
        outputs, state = self._apply(*self._lowered(parameters, state, x), jax.random.fold_in(key, step), True)
        losses = self._losses(outputs, y)
        if mask is None:
            return jnp.mean(losses), (state, jnp.sum(losses))
        summed = jnp.sum(losses * mask)
        return summed / jnp.sum(mask), (state, summed)

    def _lowered(self, parameters: Tree, state: Tree, x: Any) -> tuple[Tree, Tree, Any]:
        """Return what training computes with, at its own precision."""
        low = jax.tree.map(lambda leaf: leaf.astype(self._dtype), parameters)
        return low, state, x.astype(self._dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    @cached_property
    def _gradient(self) -> Any:
        return jax.value_and_grad(self._down, has_aux=True)

    @cached_property
    def _leaned(self) -> Any:
        def loss(parameters: Tree, state: Tree, x: Any, y: Any, key: Any, step: Any, slope: Any) -> Any:
            down, kept = self._down(parameters, state, x, y, key, step)
            seen = self._represent(*self._lowered(parameters, state, x), jax.random.fold_in(key, step), True)
            return down + jnp.sum(slope * seen), kept  # its gradient is the slope's, whatever loss that is of

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def _represent(self, parameters: Tree, state: Tree, x: Any, key: Any, training: bool) -> Any:
        given = (parameters, state) if self._model.stateful else (parameters,)
        seen = cast("Callable[..., Any]", self._model.represent)(*given, x, key, training)
        return jnp.reshape(seen, (len(x), -1)).astype(jnp.float32)

    @cached_property
    def _seen(self) -> Any:
        return jax.jit(self._represent, static_argnums=4)

    @cached_property
    def _seen_in_training(self) -> Any:
        return jax.jit(
            lambda parameters, state, x, key, step: self._represent(
                *self._lowered(parameters, state, x), jax.random.fold_in(key, step), True
            )
        )

    def represent(self, groups: Groups, layer: str | None) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """See `Representing.represent`: it is the model's own `represent`."""
        if layer is not None:
            raise PlanError("aggregation.options.layer: a model of JAX functions has its own `represent`: leave layer out")
        model = self._trees({name: groups[name].values for name in self.layouts})
        return lambda x: np.asarray(self._seen(*model, x, jax.random.key(0), False))

    @cached_property
    def _step(self) -> Any:
        def step(carry: Any, x: Any, y: Any, key: Any, step: Any, learning_rate: Any) -> Any:
            (_, (state, loss)), gradient = self._gradient(carry[0], carry[1], x, y, key, step)
            return (*self._move(carry, gradient, learning_rate), state, loss)

        return jax.jit(step)

    def _move(self, carry: Any, gradient: Tree, learning_rate: Any) -> tuple[Tree, Tree]:
        moves, memory = self._optimizer(learning_rate).update(gradient, carry[2], carry[0])
        return optax.apply_updates(carry[0], moves), memory

    @cached_property
    def _gradient_only(self) -> Any:
        return jax.jit(lambda carry, x, y, *seed: self._gradient(carry[0], carry[1], x, y, *seed))

    @cached_property
    def _moved(self) -> Any:
        return jax.jit(self._move)

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
        """See `Learner.fit`; a short last batch is a shape of its own, so that batch norm sees true rows only."""
        parameters, state = self._trees({name: groups[name].values for name in self.layouts})
        learning_rate = jnp.float32(self._learning_rate * rate)
        carry = (parameters, state, self._optimizer(self._learning_rate).init(parameters))
        key = jax.random.key(int(rng.integers(1 << 31)))
        losses, samples = [], 0
        with named.said("model.jax", rows):
            for step, batch in enumerate(batches(rng, len(rows), batch_size, steps)):
                x, y = self._arrays(rows, batch)
                if correct is None and lean is None:
                    parameters, memory, state, loss = self._step(carry, x, y, key, step, learning_rate)
                else:
                    if lean is None:
                        (_, (state, loss)), gradient = self._gradient_only(carry, x, y, key, step)
                    else:
                        seen = self._seen_in_training(carry[0], carry[1], x, key, step)
                        slope = lean.slope(x, np.asarray(seen))
                        (_, (state, loss)), gradient = self._leaned(carry[0], carry[1], x, y, key, step, slope)
                    mended = gradient if correct is None else self._mended(gradient, carry[0], correct)
                    parameters, memory = self._moved(carry, mended, learning_rate)
                carry = (parameters, state, memory)
                losses.append(loss)
                samples += len(batch)
            lost = float(np.sum(jax.device_get(losses)))
        return Fit(self._groups(carry[0], carry[1]), {"samples": float(samples), "loss": lost})

    def _mended(self, gradient: Tree, parameters: Tree, correct: Correct) -> Tree:
        layout = self.layouts["parameters"]
        flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (gradient, parameters)]
        mended = np.asarray(correct(flat[0], flat[1]), np.float32)
        return jax.tree.unflatten(jax.tree.structure(gradient), [jnp.asarray(a) for a in layout.views(mended).values()])

    @cached_property
    def _judge(self) -> Any:
        def judge(parameters: Tree, state: Tree, x: Any, y: Any) -> Any:
            outputs, _ = self._apply(parameters, state, x, jax.random.key(0), False)
            return outputs, self._losses(outputs, y)

        return jax.jit(judge)

    @cached_property
    def _clipped(self) -> Any:
        def one(parameters: Tree, state: Tree, x: Any, y: Any, key: Any) -> Any:
            _, gradient = self._gradient(parameters, state, x[None], y[None], key, 0)
            return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

        def summed(parameters: Tree, state: Tree, x: Any, y: Any, mask: Any, keys: Any, bound: Any, steps: Any) -> Any:
            gradients = jax.vmap(one, (None, None, 0, 0, 0))(parameters, state, x, y, keys)
            whole = by_row.whole(jnp, gradients, bound, steps).astype(jnp.int32)
            return jnp.sum(jnp.where(mask[:, None], whole, 0), axis=0)

        return jax.jit(summed)

    def clipped(self, groups: Groups, rows: Rows, bound: float, steps: int) -> NDArray[np.float64]:
        """See `PerExample.clipped`; by vmap over rows, as many at a time as fit into memory."""
        size = self.layouts["parameters"].size
        parameters, state = self._trees({name: groups[name].values for name in self.layouts})
        total, secret = np.zeros(size), jax.random.key(int(np.frombuffer(new_secret()[:4], np.uint32)[0]))
        for number, (which, there) in enumerate(by_row.filled(size, len(rows))):
            keys = jax.random.split(jax.random.fold_in(secret, number), len(which))
            total += np.asarray(self._clipped(parameters, state, *self._arrays(rows, which), there, keys, bound, float(steps)))
        return total

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`; always in float32. Without a known task the sums are `samples`, `loss` and the plan's own."""
        parameters, state = self._trees({name: groups[name].values for name in self.layouts})
        loss, outputs = 0.0, []
        with named.said("model.jax", rows):
            for lo in range(0, len(rows), _ROWS):
                arrays = self._arrays(rows, slice(lo, lo + _ROWS))
                part, lost = self._judge(parameters, state, *filled(arrays, _ROWS))  # clients hold many different numbers of rows
                outputs.append(np.asarray(part)[: len(arrays[0])])
                loss += float(np.asarray(lost)[: len(arrays[0])].sum())
        return self._sums(np.concatenate(outputs), loss, rows.y)

    def _sums(self, outputs: NDArray[Any], loss: float, y: NDArray[Any]) -> Metrics:
        return {**named.judged(self.task, loss, outputs, y, self.count), **self.measure(outputs, y)}

    def pure(self) -> Pure:
        """See `Compiled.pure`."""

        def own(rng: np.random.Generator, rate: float) -> tuple[NDArray[Any], ...]:
            return np.asarray(rng.integers(1 << 31), np.int32), np.asarray(self._learning_rate * rate, np.float32)

        def begin(flats: dict[str, Any], own: Any) -> Any:
            del own
            parameters, state = self._trees(flats)
            return parameters, state, self._optimizer(self._learning_rate).init(parameters)

        def step(carry: Any, own: Any, x: Any, y: Any, mask: Any, number: Any) -> tuple[Any, Any]:
            seed, learning_rate = own
            key = jax.random.key(seed)
            (_, (state, loss)), gradient = self._gradient(carry[0], carry[1], x, y, key, number, mask)
            parameters, memory = self._move(carry, gradient, learning_rate)
            return (parameters, state, memory), loss

        def end(carry: Any) -> dict[str, Any]:
            arrays = _leaves(carry[0]) | _leaves(carry[1])
            return {
                group: jnp.concatenate([jnp.ravel(arrays[tensor.name]) for tensor in layout.tensors])
                for group, layout in self.layouts.items()
            }

        def judge(flats: dict[str, Any], x: Any, y: Any) -> tuple[Any, Any]:
            outputs, _ = self._apply(*self._trees(flats), x, jax.random.key(0), False)
            return outputs, self._losses(outputs, y)

        return Pure(own, self._arrays, begin, step, end, judge, lambda *told: self._sums(told[0], float(told[1].sum()), told[2]),
                    self._apart)  # fmt: skip

    def _apart(self, x: NDArray[Any]) -> bool:
        """Try it: some rows of a batch give what they give in the whole batch, at another key, with random parameters."""
        rng = np.random.default_rng(0)
        parameters, state = self._trees(
            {name: rng.standard_normal(layout.size).astype(np.float32) for name, layout in self.layouts.items()}
        )
        whole = self._apply(parameters, state, x, jax.random.key(1), True)
        part = self._apply(parameters, state, x[: len(x) // 2], jax.random.key(2), True)
        return named.alike(np.asarray(whole[0])[: len(x) // 2], np.asarray(part[0])) and not self._model.stateful

    def _arrays(self, rows: Rows, which: NDArray[np.intp] | slice) -> tuple[Any, Any]:
        """Return some rows as JAX takes them: whole numbers as int32, all others as float32; class labels are whole."""
        x = np.asarray(rows.x[which], np.int32 if rows.x.dtype.kind in "iu" else np.float32)
        whole = self.task == "classes" or (self.task is None and rows.y.dtype.kind in "iu")
        y = np.asarray(rows.y[which], np.int32 if whole else np.float32)
        return x, y


def _leaves(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a pytree by name, in JAX's own order."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in found}
    if len(leaves) < len(found):
        raise LearnerError("model.jax: two arrays of the model have the same name; use no '/' in its keys")
    return leaves


def _layouts(trees: tuple[Tree, Tree]) -> dict[str, Layout]:
    parts = [{name: named.Form(leaf.shape, str(leaf.dtype)) for name, leaf in _leaves(tree).items()} for tree in trees]
    return named.layouts("model.jax", *parts)
