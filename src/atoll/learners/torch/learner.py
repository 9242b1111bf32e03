"""A PyTorch module as a learner: its tensors as flat groups, fitted by any of torch.optim.

`parameters` are what is trained, tied ones once. `buffers` are the module's other real numbers: its persistent buffers,
and frozen parameters; `counts` its whole ones. Frozen parameters travel because a node's own function may draw or load
other values: everyone has to hold the server's. No step moves them, so their mean is what they were, to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.errors import LearnerError
from atoll.keys import new_secret
from atoll.learner import Call, Correct, Fit, How, Lean, Measure, Rows, Together, batches, nothing
from atoll.learners import by_row, named
from atoll.learners.torch import represented
from atoll.learners.torch.gradients import ByRow, summed
from atoll.learners.torch.stacked import Stacked
from atoll.metrics import Count, Task
from atoll.vector import Flat, Group, Groups, Layout, Metrics

LOSSES: Mapping[str, Task] = {
    "cross_entropy": "classes",
    "nll_loss": "classes",
    "binary_cross_entropy_with_logits": "binary",
    "mse_loss": "numbers",
    "l1_loss": "numbers",
    "smooth_l1_loss": "numbers",
    "huber_loss": "numbers",
}
"""Losses of torch.nn.functional, and what the outputs they take stand for."""
OPTIMIZERS = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    # What needs more than gradients of dense tensors, or takes matrices alone, is left out.
    if isinstance(kind, type) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}
_ROWS = 4096
"""Rows judged at a time."""
_ONE_AT_A_TIME = threading.Lock()
"""Dropout draws from the one generator that PyTorch has in a process: two fits at a time would draw from each other's."""


class Torch:
    """A PyTorch module and how it is fitted; on the first CUDA device where there is one.

    Args:
        make: returns a new module.
        loss: the name of one of `LOSSES`.
        optimizer: `(parameters, rate) -> torch.optim.Optimizer`; it starts anew in each fit.
        precision: of the arithmetic of training, by autocast; parameters and their steps stay float32.
        can: what follows from the optimiser: `sgd` if it takes plain steps, `vmap` if it looks at each number for itself.
    """

    chances = True
    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(
        self,
        make: Callable[[], Any],
        loss: str,
        optimizer: Callable[[list[Any], float], Any],
        precision: str,
        can: Collection[str] = (),
    ) -> None:
        self.can = frozenset({"correct", "per_example", "represent", *can})
        self._make, self._optimizer = make, optimizer
        self.task, self._loss = LOSSES[loss], getattr(torch.nn.functional, loss)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._autocast = precision == "bfloat16"
        with self._seeded(0):
            self._module = make().to(self._device)
        tensors = _tensors(self._module)
        self._trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
        self.layouts = _layouts(tensors)
        self.moving = tuple(name for name, one in tensors.items() if not isinstance(one, torch.nn.Parameter))
        self._by_row = ByRow(self._module, self._trained, self._training_losses)
        # Buffers that don't travel begin each time as they were made, so that no fit leaves anything to the next one.
        self._own = {name: one.clone() for name, one in self._module.named_buffers() if name not in tensors}

    def initial(self, seed: int) -> Groups:
        """Return a freshly initialised model.

        Raises:
            LearnerError: the function made another model than the first time.
        """
        with self._seeded(seed):
            tensors = _tensors(self._make())
        named.same("model.torch", _layouts(tensors), self.layouts)
        return self._groups(tensors)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Have PyTorch's generator to oneself, in a known state; it is put back."""
        with _ONE_AT_A_TIME, torch.random.fork_rng(range(self._device == "cuda")):
            torch.manual_seed(seed)
            yield

    def _groups(self, tensors: Mapping[str, Any]) -> Groups:
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        return {
            group: Group(layout, layout.flatten({tensor.name: arrays[tensor.name] for tensor in layout.tensors}))
            for group, layout in self.layouts.items()
        }

    def _load(self, groups: Groups, module: Any) -> None:
        tensors = _tensors(module)
        with torch.no_grad():
            for group in self.layouts:
                for name, array in groups[group].arrays.items():
                    tensors[name].copy_(torch.tensor(array))
            for name, buffer in module.named_buffers():
                if name in self._own:
                    buffer.copy_(self._own[name])

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
        """See `Learner.fit`; dropout and the like draw from a generator that `rng` seeds."""
        losses, samples = [], 0
        with self._seeded(int(rng.integers(1 << 31))), named.said("model.torch", rows):
            self._load(groups, self._module)
            self._module.train()
            optimizer = self._optimizer(self._trained, rate)
            for batch in batches(rng, len(rows), batch_size, steps):
                x, y = self._arrays(rows, batch)
                optimizer.zero_grad()
                loss = self._backward(x, y, lean)
                if correct is not None:
                    self._correct(correct)
                optimizer.step()
                losses.append(loss.detach().sum())
                samples += len(batch)
            fitted = self._groups(_tensors(self._module))
        return Fit(fitted, {"samples": float(samples), "loss": float(torch.stack(losses).double().sum())})

    def _backward(self, x: Any, y: Any, lean: Lean | None) -> Any:
        """Add a mini-batch's gradient to what is in the parameters' own; return the loss of each row."""
        if lean is None:
            losses = self._training_losses(self._module, x, y)
            losses.mean().backward()
            return losses
        with represented.watched(self._module, lean.layer) as seen:
            losses = self._training_losses(self._module, x, y)
        found = represented.rows_of(seen, len(x))
        slope = lean.slope(x.cpu().numpy(), found.detach().cpu().numpy())
        # The gradient of this sum is the slope's, whatever loss that is of.
        (losses.mean() + (torch.tensor(slope, dtype=found.dtype, device=self._device) * found).sum()).backward()
        return losses

    def represent(self, groups: Groups, layer: str | None) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """See `Representing.represent`; a layer's name is the module's own, as `named_modules` has it."""
        represented.check(self._module, layer)
        with self._seeded(0):
            module = self._make().to(self._device).eval()  # one of its own: this is asked while the learner's is being fitted
        self._load(groups, module)

        def seen(x: NDArray[Any]) -> NDArray[Any]:
            with torch.no_grad(), represented.watched(module, layer) as found:
                module(torch.tensor(x, device=self._device))
            return np.asarray(represented.rows_of(found, len(x)).cpu().numpy())

        return seen

    def _correct(self, correct: Correct) -> None:
        """Put into each parameter's gradient what an algorithm makes of all of them; one that had no part has a zero one."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._trained]
        flat = [torch.cat([one.detach().reshape(-1) for one in many]).cpu().numpy() for many in (gradients, self._trained)]
        mended = np.asarray(correct(flat[0], flat[1]), np.float32)
        for parameter, array in zip(self._trained, self.layouts["parameters"].views(mended).values(), strict=True):
            parameter.grad = torch.tensor(array, device=self._device)

    def clipped(self, groups: Groups, rows: Rows, bound: float, steps: int) -> NDArray[np.float64]:
        """See `PerExample.clipped`; by vmap where the module lets it, as many rows at a time as fit into memory."""
        parameters = self.layouts["parameters"].size
        total, size = np.zeros(parameters), by_row.together(parameters, len(rows))
        with self._seeded(int(np.frombuffer(new_secret()[:4], np.uint32)[0])), named.said("model.torch", rows):
            self._load(groups, self._module)
            self._module.train()
            for lo in range(0, len(rows), size):
                gradients = self._by_row(*self._arrays(rows, slice(lo, lo + size)))
                total += summed(gradients, bound, steps).cpu().numpy()
        return total

    def _training_losses(self, call: Callable[[Any], Any], x: Any, y: Any) -> Any:
        """Return the loss of each row `[rows]`, computed as training does."""
        with torch.autocast(self._device, torch.bfloat16) if self._autocast else nullcontext():
            outputs = call(x)
        return self._losses(outputs, y)

    def _losses(self, outputs: Any, y: Any) -> Any:
        """Return the loss of each row `[rows]`, in float32: the mean over its outputs."""
        if not isinstance(outputs, torch.Tensor):
            raise LearnerError(f"model.torch: the module returned a {type(outputs).__name__}: it returns one tensor [rows, …]")
        outputs = outputs.float()
        losses = self._loss(outputs, y if self.task == "classes" else y.reshape(outputs.shape), reduction="none")
        return losses.reshape(len(y), -1).mean(dim=1)

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`; always in float32."""
        with named.said("model.torch", rows), self._judging(groups) as judge:
            parts = [judge(*self._host(rows, slice(lo, lo + _ROWS))) for lo in range(0, len(rows), _ROWS)]
        outputs, losses = (np.concatenate(told) for told in zip(*parts, strict=True))
        return self._sums(outputs, losses, rows.y)

    @contextmanager
    def _judging(self, groups: Groups) -> Iterator[Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]]:
        """Give what tells a model's outputs `[rows, …]` and losses `[rows]`, float64."""

        def judge(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
            outputs = self._module(self._tensor(x))
            losses = self._losses(outputs, self._tensor(y))
            return outputs.cpu().numpy(), losses.double().cpu().numpy()

        with self._seeded(0), torch.no_grad():
            self._load(groups, self._module)
            self._module.eval()
            yield judge

    def _sums(self, outputs: NDArray[Any], losses: NDArray[Any], y: NDArray[Any]) -> Metrics:
        return {**named.judged(self.task, float(losses.sum()), outputs, y, self.count), **self.measure(outputs, y)}

    def together(self) -> Together:
        """See `SideBySide.together`."""

        def own(rng: np.random.Generator, rate: float) -> tuple[NDArray[Any], ...]:
            rng.integers(1 << 31)  # of what a single fit draws by chance; no module that does goes side by side
            return (np.asarray(rate, np.float64),)

        def judge(flats: Mapping[str, Flat], x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
            model = {name: Group(one, flats[name].astype(one.dtype, copy=False)) for name, one in self.layouts.items()}
            with self._judging(model) as call:
                return call(x, y)

        def fits(how: How) -> Call:
            del how
            whole = self._module, _tensors(self._module), self._own, self.layouts
            call = Stacked(*whole, self._optimizer, self._training_losses)

            def alone(*arrays: Any) -> Any:
                with self._seeded(0):
                    self._module.train()
                    return call(*arrays)

            return alone

        return Together(own, self._host, fits, judge, self._sums, self._apart)

    def _apart(self, x: NDArray[Any]) -> bool:
        """Try it: some rows of a batch give what they give in the whole batch, and by other chances."""
        half = len(x) // 2
        with self._seeded(0), torch.no_grad():  # to oneself, since others put other numbers into the module
            self._module.train()
            whole = self._module(self._tensor(x))[:half].cpu().numpy()
            part = self._module(self._tensor(x[:half])).cpu().numpy()
        return named.alike(whole, part)

    def _host(self, rows: Rows, which: NDArray[np.intp] | slice) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return some rows as arrays of what PyTorch takes: whole numbers as int64, all others as float32; labels are whole."""
        x = np.asarray(rows.x[which], np.int64 if rows.x.dtype.kind in "iu" else np.float32)
        return x, np.asarray(rows.y[which], np.int64 if self.task == "classes" else np.float32)

    def _arrays(self, rows: Rows, which: NDArray[np.intp] | slice) -> tuple[Any, Any]:
        x, y = self._host(rows, which)
        return self._tensor(x), self._tensor(y)

    def _tensor(self, array: NDArray[Any]) -> Any:
        return torch.tensor(array, device=self._device)


def _tensors(module: Any) -> dict[str, Any]:
    """Return what of a module travels, by name: its parameters, tied ones once, and the buffers of its state."""
    parameters = dict(module.named_parameters())
    if lazy := [name for name, one in parameters.items() if torch.nn.parameter.is_lazy(one)]:
        raise LearnerError(f"model.torch: '{lazy[0]}' has no shape yet: give lazy layers their sizes")
    kept = module.state_dict(keep_vars=True)
    return {**parameters, **{name: one for name, one in module.named_buffers() if name in kept}}


def _layouts(tensors: Mapping[str, Any]) -> dict[str, Layout]:
    forms: list[dict[str, named.Form]] = [{}, {}]
    for name, one in tensors.items():
        forms[not one.requires_grad][name] = named.Form(tuple(one.shape), str(one.dtype).removeprefix("torch."))
    return named.layouts("model.torch", *forms)
