"""Many clients' fits in one call: parameters `[clients, …]`, gradients by vmap, and one optimiser for all.

The optimiser is PyTorch's own, over stacked parameters: what it does to a number depends on that number's gradients alone,
so each client gets the steps that it would take by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.errors import AtollError, LearnerError
from atoll.learners.torch.gradients import ELSEWHERE, func, line, names
from atoll.vector import Layouts

BY_NUMBER = frozenset({"sgd", "adam", "adamw", "adagrad", "adadelta", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop"})
"""Optimisers that look at each number for itself."""


class Stacked:
    """What fits many clients at once; a `learner.Call`, whose `owns` are the clients' learning rates, as factors.

    Args:
        module: what is fitted; its own tensors aren't touched.
        tensors: what of it travels, by name.
        here: its other buffers, by name, as they were made: each fit begins with them.
        layouts: of the groups.
        optimizer: `(parameters, rate) -> torch.optim.Optimizer`.
        loss: `(call, x, y) -> losses [rows]`, where `call(x)` is the module's output.

    Raises:
        LearnerError: on a call: PyTorch can't vectorise the module.
    """

    def __init__(
        self,
        module: Any,
        tensors: Mapping[str, Any],
        here: Mapping[str, Any],
        layouts: Layouts,
        optimizer: Callable[[list[Any], float], Any],
        loss: Callable[[Callable[[Any], Any], Any, Any], Any],
    ) -> None:
        self._module, self._layouts, self._optimizer, self._loss = module, layouts, optimizer, loss
        known = names(module)
        self._names = {name: known[id(one)] for name, one in tensors.items()}
        self._trained = [name for name, one in tensors.items() if one.requires_grad]
        self._device = next(iter(tensors.values())).device
        self._here = here
        self._names |= {name: known[id(one)] for name, one in module.named_buffers() if name in here}

    def __call__(
        self,
        kind: tuple[bool, int],
        count: Any,
        flats: Mapping[str, NDArray[Any]],
        owns: tuple[NDArray[Any]],
        x: NDArray[Any],
        y: NDArray[Any],
        masks: NDArray[Any] | None,
        steps: NDArray[np.int32],
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
        """Fit clients; those with one learning rate go together."""
        del kind, count
        fitted = {name: np.empty((len(steps), layout.size), layout.dtype) for name, layout in self._layouts.items()}
        losses = np.zeros(len(steps))
        for rate in np.unique(owns[0]):
            who = np.flatnonzero(owns[0] == rate)
            given = {name: flat if flat.ndim == 1 else flat[who] for name, flat in flats.items()}
            some = (x[who], y[who], None if masks is None else masks[who], steps[who])
            try:
                found, losses[who] = self._fit(float(rate), given, *some)
            except AtollError:
                raise
            except Exception as error:  # whatever the module's own code raises
                raise LearnerError(
                    f"--strategy vmap: PyTorch can't fit this model for many clients at once ({line(error)}); take pool or map"
                ) from error
            for name, array in found.items():
                fitted[name][who] = array
        return fitted, losses

    def _fit(
        self,
        rate: float,
        flats: Mapping[str, NDArray[Any]],
        x: NDArray[Any],
        y: NDArray[Any],
        masks: NDArray[Any] | None,
        steps: NDArray[np.int32],
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
        clients = len(steps)
        begun = self._stacked(flats, clients)
        trained = [begun.pop(name).requires_grad_() for name in self._trained]
        kept = begun | {name: one.expand(clients, *one.shape).clone() for name, one in self._here.items()}
        optimizer = self._optimizer(trained, rate)
        step = func().vmap(func().grad(self._one, has_aux=True), (0, 0, 0, 0, None if masks is None else 0), randomness="error")
        fitted = {name: np.empty((clients, layout.size), layout.dtype) for name, layout in self._layouts.items()}
        losses, everyone = np.zeros(clients), np.arange(clients)
        for number in range(int(steps.max())):
            at = np.minimum(number, steps - 1)  # who is at its end goes on with its last batch, for nothing
            batch = [self._tensor(array[everyone, at]) for array in (x, y)]
            mask = None if masks is None else self._tensor(masks[everyone, at])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of single operations that vmap takes client by client
                gradients, (mean, (lost, kept)) = step([one.detach() for one in trained], kept, *batch, mask)
            if mean.requires_grad:  # detached ones don't
                raise RuntimeError(ELSEWHERE)
            for one, gradient in zip(trained, gradients, strict=True):
                one.grad = gradient
            optimizer.step()
            losses += np.where(number < steps, lost.double().cpu().numpy(), 0)
            self._ended(np.flatnonzero(steps == number + 1), dict(zip(self._trained, trained, strict=True)) | kept, fitted)
        return fitted, losses

    def _one(self, values: Sequence[Any], kept: Mapping[str, Any], x: Any, y: Any, mask: Any) -> Any:
        """One client's batch: the mean loss, its sum, and what the buffers are now."""
        kept = {name: one.clone() for name, one in kept.items()}
        own = dict(zip(self._trained, values, strict=True)) | kept
        given = {name: one for key, one in own.items() for name in self._names[key]}
        losses = self._loss(lambda x: func().call(self._module, given, (x,)), x, y)
        if mask is None:
            return losses.mean(), (losses.sum().detach(), kept)
        total = (losses * mask).sum()
        return total / mask.sum(), (total.detach(), kept)

    def _stacked(self, flats: Mapping[str, NDArray[Any]], clients: int) -> dict[str, Any]:
        """Return flat vectors, one for all or `[clients, size]`, as tensors `[clients, …]` by name."""
        stacked = {}
        for group, layout in self._layouts.items():
            vectors = np.broadcast_to(flats[group].astype(layout.dtype, copy=False), (clients, layout.size))
            for part, (lo, hi) in zip(layout.tensors, pairwise(layout.offsets), strict=True):
                stacked[part.name] = self._tensor(vectors[:, lo:hi].reshape(clients, *part.shape))
        return stacked

    def _tensor(self, array: NDArray[Any]) -> Any:
        return torch.tensor(array, device=self._device)

    def _ended(self, who: NDArray[np.intp], tensors: Mapping[str, Any], fitted: Mapping[str, NDArray[Any]]) -> None:
        """Put down what clients have who are at their end."""
        if not len(who):
            return
        for group, layout in self._layouts.items():
            parts = [tensors[part.name][who].detach().reshape(len(who), -1).cpu().numpy() for part in layout.tensors]
            fitted[group][who] = np.concatenate(parts, axis=1)
