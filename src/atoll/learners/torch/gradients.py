"""The gradients of single rows: by vmap, in one call, where PyTorch can; else one after the other.

Each row is a batch of its own, and no buffer goes from one row to another: so whatever a module does, no row has a part in
another row's gradient. That is what a bound on each row's gradient rests on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from atoll.learners import by_row

ELSEWHERE = "it keeps its parameters elsewhere than under their names"
_LOG = logging.getLogger("atoll.learners")


class _Func(NamedTuple):
    """PyTorch's transformations of functions."""

    call: Callable[..., Any]
    grad: Callable[..., Any]
    vmap: Callable[..., Any]


@cache
def func() -> _Func:
    """Return PyTorch's transformations, by their name in the version that is there."""
    try:
        from torch.func import functional_call, grad_and_value, vmap
    except ImportError:  # before PyTorch 2; it takes a second or two
        from functorch import grad_and_value, vmap
        from torch.nn.utils.stateless import functional_call
    return _Func(functional_call, grad_and_value, vmap)


def names(module: Any) -> dict[int, list[str]]:
    """Return a module's parameters and buffers by `id`: the names of each; tied ones have many."""
    found: dict[int, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            found.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return found


class ByRow:
    """What gives a module's gradients row by row.

    Args:
        module: whose parameters and buffers are read at each call.
        trained: the parameters to differentiate by, in the order of the vector.
        loss: `(call, x, y) -> losses [rows]`, where `call(x)` is the module's output.
    """

    def __init__(self, module: Any, trained: Sequence[Any], loss: Callable[[Callable[[Any], Any], Any, Any], Any]) -> None:
        self._module, self._trained, self._loss = module, trained, loss
        self._names = names(module)
        self._vectorised = True

    def __call__(self, x: Any, y: Any) -> list[Any]:
        """Return the rows' gradients, `[rows, …]` by each parameter."""
        if self._vectorised:
            try:
                return self._at_once(x, y)
            except Exception as error:  # noqa: BLE001  whatever can't be vectorised; if it is the rows' fault, the slow way says so
                slow = self._slowly(x, y)
                self._vectorised = False
                _LOG.warning("privacy.example_noise: PyTorch can't vectorise this model, so rows go one by one: %s", line(error))
                return slow
        return self._slowly(x, y)

    def _at_once(self, x: Any, y: Any) -> list[Any]:
        values = [one.detach() for one in self._trained]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of single operations that vmap takes row by row
            found, losses = func().vmap(func().grad(self._one), (None, 0, 0), randomness="different")(values, x, y)
        if losses.requires_grad:  # detached ones don't
            raise RuntimeError(ELSEWHERE)
        return list(found)

    def _one(self, values: Sequence[Any], x: Any, y: Any) -> Any:
        given = {name: value for one, value in zip(self._trained, values, strict=True) for name in self._names[id(one)]}
        kept = {name: one.clone() for one in self._module.buffers() for name in self._names[id(one)]}
        return self._loss(lambda x: func().call(self._module, {**given, **kept}, (x,)), x[None], y[None])[0]

    def _slowly(self, x: Any, y: Any) -> list[Any]:
        kept, rows = {name: one.clone() for name, one in self._module.named_buffers()}, []
        for k in range(len(x)):
            found = torch.autograd.grad(self._loss(self._module, x[k : k + 1], y[k : k + 1])[0], self._trained, allow_unused=True)
            pairs = zip(found, self._trained, strict=True)
            rows.append([torch.zeros_like(parameter) if part is None else part for part, parameter in pairs])
            with torch.no_grad():
                for name, one in self._module.named_buffers():
                    one.copy_(kept[name])
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def summed(gradients: Sequence[Any], bound: float, steps: int) -> Any:
    """Return the sum `[p]`, float64, of rows' gradients, as `by_row.whole` makes each; part by part, since all at once is slower.

    What is given isn't written into: PyTorch may give one tensor as the gradient of two parameters (an LSTM's biases).
    """
    parts = [one.reshape(len(one), -1) for one in gradients]
    # In float64: PyTorch's own float32 norm of a million numbers was too short by two parts in a thousand.
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
    lengths = norms.square().sum(dim=0).sqrt()
    scales = ((bound * by_row.ROOM / lengths).clamp(max=1.0) * (steps / bound)).float()[:, None]
    lost = ~torch.isfinite(lengths)
    wholes = ((part * scales).trunc_().masked_fill_(lost[:, None], 0) for part in parts)
    return torch.cat([whole.sum(dim=0, dtype=torch.float64) for whole in wholes])


def line(error: Exception) -> str:
    """Return the beginning of what PyTorch says."""
    return str(error).strip().partition("\n")[0][:160]
