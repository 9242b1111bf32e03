"""What a layer of a PyTorch module makes of each row, seen as rows pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from atoll.errors import PlanError

_SAID = "aggregation.options.layer:"


def check(module: Any, layer: str | None) -> None:
    """Check that a module has a layer that stands for a row; None is what the last layer with weights takes.

    Raises:
        PlanError: it has none.
    """
    names = [name for name, _ in module.named_modules() if name]
    if layer is None and len(_weighing(module)) < 2:
        raise PlanError(f"{_SAID} the model has one layer with weights, so none that represents a row; name a deeper model")
    if layer is not None and layer not in names:
        raise PlanError(f"{_SAID} the model has no layer '{layer}'; it has {', '.join(names[:20])}")


@contextmanager
def watched(module: Any, layer: str | None) -> Iterator[list[Any]]:
    """Have what stands for the rows that go through a module put into a list, anew each time."""
    seen: list[Any] = []

    def takes(part: Any, given: tuple[Any, ...]) -> None:
        del part
        seen[:] = given[:1]  # the last one to be called stays

    def gives(part: Any, given: tuple[Any, ...], output: Any) -> None:
        del part, given
        seen[:] = [output.clone() if isinstance(output, torch.Tensor) else output]  # the next layer may write into it

    parts = _weighing(module) if layer is None else [module.get_submodule(layer)]
    hooks = [part.register_forward_pre_hook(takes) if layer is None else part.register_forward_hook(gives) for part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(seen: list[Any], rows: int) -> Any:
    """Return what was seen as representations `[rows, width]`, float32.

    Raises:
        PlanError: it is no tensor of that many rows.
    """
    if len(seen) != 1 or not isinstance(seen[0], torch.Tensor) or not seen[0].shape or len(seen[0]) != rows:
        found = "nothing" if not seen else tuple(getattr(seen[0], "shape", ())) or f"a {type(seen[0]).__name__}"
        raise PlanError(f"{_SAID} what stands for {rows} rows is {found} and no tensor with as many rows; name another layer")
    return seen[0].reshape(rows, -1).float()


def _weighing(module: Any) -> list[Any]:
    return [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
