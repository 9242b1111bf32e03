"""Personal layers: a part of the model never leaves its node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only, trained
from atoll.errors import PlanError
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update

Patterns = tuple[str, ...]


def fedper(personal: Sequence[str], *, weighted: bool = True) -> Algorithm:
    """Average all arrays but the personal ones, which each node trains and keeps for itself.

    Updates hold the shared arrays alone: less to send, and the personal ones are seen by nobody. The server's model keeps the
    first values of these. Both parts are trained together, as in the paper.

    Args:
        personal: names of arrays, with `*` and `?`, for instance `["dense_1/*"]`.
        weighted: by rows; else each node has one voice.

    Raises:
        PlanError: no names; or, once the model is known, names that fit none of its arrays, or all.

    Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", Algorithms 1 and 2.
    """
    names = _words("personal", personal)

    def shared(model: Layouts) -> Layouts:
        parts = {name: _only(layout, names, mine=False) for name, layout in model.items()}
        left = {name: layout for name, layout in parts.items() if layout.tensors}
        if not left or left == model:
            known = [tensor.name for layout in model.values() for tensor in layout.tensors]
            said = "fits every array" if not left else "fits no array"
            raise PlanError(f"aggregation.options.personal: {list(names)} {said} of the model; it has {', '.join(known[:20])}")
        return left

    def own(learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
        del rows, pace, rng
        return {name: _put(group, names, memory.get(name)) for name, group in only(brief, learner.layouts).items()}

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        start = own(learner, brief, memory, rows, pace, rng)
        update = trained(learner, start, rows, pace, rng)
        mine = {
            name: _taken(group.with_values(group.values + update.groups[name].values), names, mine=True)
            for name, group in start.items()
        }
        sent = {name: _taken(update.groups[name], names, mine=False) for name in shared(learner.layouts)}
        return {name: group for name, group in mine.items() if group.values.size}, Update(sent, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        return {**state, **{name: _moved(state[name], names, total, name) for name in total.groups}}

    return fedavg(weighted=weighted)._replace(updates=shared, local=local, step=step, own=own)


def _words(option: str, given: Sequence[str]) -> Patterns:
    if isinstance(given, str) or not given or not all(isinstance(one, str) for one in given):
        raise PlanError(
            f'aggregation.options.{option}: is a list of names of arrays, for instance ["dense_1/*"]; it is {given!r}'
        )
    return tuple(given)


@lru_cache(maxsize=64)
def _mask(layout: Layout, names: Patterns) -> NDArray[np.bool_]:
    """Which numbers of a vector are personal."""
    mask = np.zeros(layout.size, bool)
    for tensor, view in layout.views(mask).items():
        view[...] = _fits(tensor, names)
    return mask


def _fits(tensor: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(tensor, name) for name in names)


@lru_cache(maxsize=64)
def _only(layout: Layout, names: Patterns, *, mine: bool) -> Layout:
    """The layout of the personal arrays, or of the others."""
    kept: tuple[Tensor, ...] = tuple(tensor for tensor in layout.tensors if _fits(tensor.name, names) == mine)
    return replace(layout, tensors=kept)


def _taken(group: Group, names: Patterns, *, mine: bool) -> Group:
    return Group(_only(group.layout, names, mine=mine), group.values[_mask(group.layout, names) == mine])


def _put(group: Group, names: Patterns, mine: Group | None) -> Group:
    if mine is None:
        return group
    values = group.values.copy()
    values[_mask(group.layout, names)] = mine.values
    return group.with_values(values)


def _moved(group: Group, names: Patterns, total: Total, name: str) -> Group:
    values = group.values.copy()
    values[~_mask(group.layout, names)] += total.mean(name)
    return group.with_values(values)
