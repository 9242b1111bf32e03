"""Federated averaging."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, State
from atoll.algorithms.folds import mean
from atoll.algorithms.local import plainly, uniformly
from atoll.algorithms.staleness import buffered
from atoll.vector import Group, Groups, Layouts, Total


def fedavg(*, weighted: bool = True) -> Algorithm:
    """Average the nodes' models.

    Args:
        weighted: by their rows, as in the paper; else each node has one voice.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", Algorithm 1: w ← w + Σ (nₖ/n) (wₖ − w).
    """
    fold = mean if weighted else uniformly
    return Algorithm(init=dict, brief=_same, updates=_layouts, local=plainly, step=moved, fold=fold, late=buffered)


def moved(state: State, total: Total) -> State:
    """Move each group of the state that nodes sent by the mean of what they sent."""
    return {**state, **{name: _added(state, total, name) for name in total.groups}}


def _added(state: State, total: Total, name: str) -> Group:
    move = total.mean(name)
    # Into the mean's own array: one model less in memory.
    return state[name].with_values(np.add(state[name].values, move, out=move))


def _same(state: State) -> Groups:
    return state


def _layouts(model: Layouts) -> Layouts:
    return model
