"""IFCA: several models, and each node works on the one that fits it best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.algorithms.local import only, trained
from atoll.algorithms.options import above_0
from atoll.errors import PlanError
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Group, Groups, Layout, Layouts, Tensor, Total, Update

_CLOSED = Layout((Tensor("rounds", (1,)),), "int64", "plain")


def ifca(clusters: int = 2, spread: float = 0.01, warmup: int = 5) -> Algorithm:
    """Each node fits the cluster's model with the least loss on its rows; a cluster's model moves by its nodes' mean, by rows.

    All models go to every node, and updates are as large, mostly zeros. What the server judges and exports as the model is the
    mean of the clusters' models, by the rows behind them in the last round; `clusters` has them all.

    Where nodes disagree, a small step parts them from a model that suits all alike. So the first rounds are FedAvg's, and the
    clusters begin around what came of it; from a new model everybody tends to take the one that happens to be best.

    Args:
        clusters: how many models.
        spread: how far from each other they begin: a Gaussian's deviation, always drawn alike.
        warmup: rounds of FedAvg before; with 0, as in the paper, the clusters begin around the plan's first model.

    Raises:
        PlanError: an option out of its range; or a model with buffers or counts, which belong to no cluster.

    Source: Ghosh et al. 2020, "An Efficient Framework for Clustered Federated Learning", Algorithm 1, option II.
    """
    if not (type(clusters) is int and clusters >= 2):
        raise PlanError(f"aggregation.options.clusters: it is a whole number from 2 up; it is {clusters!r}")
    if not (type(warmup) is int and warmup >= 0):
        raise PlanError(f"aggregation.options.warmup: it is a whole number from 0 up; it is {warmup!r}")
    above_0(spread=spread)

    def parted(values: Flat) -> Flat:
        """The models that the clusters begin with, around one `[parameters]`."""
        noise = np.random.default_rng(0).normal(0.0, spread, (clusters, values.size))
        apart: Flat = (values + noise).astype(values.dtype)
        return apart

    def init(model: Groups) -> State:
        start = model["parameters"]
        first = np.tile(start.values, (clusters, 1)) if warmup else parted(start.values)
        layout = _clustered(start.layout, clusters)
        return {**model, "clusters": Group(layout, first.reshape(-1)), "closed": Group(_CLOSED, np.zeros(1, np.int64))}

    def updates(model: Layouts) -> Layouts:
        if model.keys() != {"parameters"}:
            more = ", ".join(name for name in model if name != "parameters")
            raise PlanError(f"aggregation.rule: 'ifca' takes a model of parameters alone; this one has {more} (batch norm?)")
        layout = model["parameters"]
        return {"clusters": replace(_clustered(layout, clusters), total="plain"), "rows": _voices(clusters)}

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        chosen, model = _best(learner, brief, rows, clusters)
        update = trained(learner, model, rows, pace, rng)
        layouts = updates(learner.layouts)
        moves = np.zeros((clusters, model["parameters"].values.size), model["parameters"].values.dtype)
        moves[chosen] = update.groups["parameters"].values * len(rows)
        voices = np.eye(clusters)[chosen] * len(rows)
        groups = {"clusters": Group(layouts["clusters"], moves.reshape(-1)), "rows": Group(layouts["rows"], voices)}
        return memory, Update(groups, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        voices = total.mean("rows")
        before = state["clusters"].values.reshape(clusters, -1)
        moves = total.mean("clusters").reshape(clusters, -1)
        after: Flat = np.array(
            [model + move / float(rows) if rows else model for model, move, rows in zip(before, moves, voices, strict=True)]
        )
        shares = (voices / voices.sum()).astype(after.dtype)
        middle = state["parameters"].with_values(np.add.reduce(after * shares[:, None], axis=0))
        closed = state["closed"].values + 1
        if closed[0] <= warmup:  # all have worked on the first
            after = parted(after[0]) if closed[0] == warmup else np.tile(after[0], (clusters, 1))
        whole = state["clusters"].with_values(after.reshape(-1))
        return {"parameters": middle, "clusters": whole, "closed": state["closed"].with_values(closed)}

    def own(learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
        del memory, pace, rng
        return _best(learner, brief, rows, clusters)[1]

    return Algorithm(init=init, brief=dict, updates=updates, local=local, step=step, fold=mean, own=own)


def _clustered(layout: Layout, clusters: int) -> Layout:
    return replace(layout, tensors=(Tensor("models", (clusters, layout.size)),))


def _voices(clusters: int) -> Layout:
    return Layout((Tensor("rows", (clusters,)),), "float64", "plain")


def _best(learner: Learner, brief: Groups, rows: Rows, clusters: int) -> tuple[int, Groups]:
    """Return which cluster's model has the least loss on the rows, and that model; of equals the first."""
    shape = only(brief, learner.layouts)["parameters"]
    models = [{"parameters": shape.with_values(one)} for one in brief["clusters"].values.reshape(clusters, -1)]
    losses = [learner.evaluate(model, rows)["loss"] for model in models]
    chosen = int(np.argmin(losses))
    return chosen, models[chosen]
