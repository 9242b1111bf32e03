"""Federated averaging."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Groups, Layouts, Total, Update, check_layouts, layouts_of


def fedavg() -> Algorithm:
    """Average the nodes' models, weighted by their rows.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", Algorithm 1: w ← w + Σ (nₖ/n) (wₖ − w).
    """
    return Algorithm(init=dict, brief=_same, updates=_layouts, local=_local, step=_step, fold=mean)


def _same(state: State) -> Groups:
    return state


def _layouts(model: Layouts) -> Layouts:
    return model


def _local(
    learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
) -> tuple[Memory, Update]:
    fit = learner.fit(brief, rows, pace.steps, pace.batch_size, rng, rate=pace.rate)
    check_layouts(fit.groups, layouts_of(brief))
    moved = {name: group.with_values(_moved(group.values, brief[name].values)) for name, group in fit.groups.items()}
    return memory, Update(moved, float(len(rows)), fit.metrics)


def _moved(fitted: Flat, received: Flat) -> Flat:
    """Into the fitted vector itself, where it is the learner's own: one model less in memory."""
    into = fitted if fitted.flags.writeable and not np.may_share_memory(fitted, received) else None
    return np.subtract(fitted, received, out=into)


def _step(state: State, total: Total) -> State:
    moves = {name: total.mean(name) for name in state}
    # Into the mean's own array: one model less in memory.
    return {name: group.with_values(np.add(group.values, moves[name], out=moves[name])) for name, group in state.items()}
