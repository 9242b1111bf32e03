"""What a server sees of a node's update: the update itself, the masked one and its sum, or one with noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from attack import Pictures

from atoll import learners
from atoll.keys import Identity, Keystream, new_secret
from atoll.learner import Rows
from atoll.plan import Plan
from atoll.privacy.dp.noise import discrete_gaussian
from atoll.privacy.fixed import Fixed
from atoll.privacy.secagg.link import secagg
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Group, Total, Update

CLIP, RATE = 1.0, 0.1
_STEPS = 1 << 20


class Round(NamedTuple):
    """What passed in a round: the model that was sent, and each node's update, as parameters in the model's layout."""

    model: Group
    updates: list[Group]
    rows: list[int]


def plan_of(sizes: Sequence[int], steps: int, batch: int) -> Plan:
    """Return the plan: a perceptron, so many steps of SGD a round."""
    model = {"jax": "atoll.learners.networks:perceptron", "options": {"sizes": list(sizes)}, "inputs": sizes[0]}
    loss = {"loss": "softmax_cross_entropy_with_integer_labels"}
    training = {"steps": steps, "batch_size": batch, "learning_rate": RATE}
    return Plan.of({"plan": {"name": "digits", "rounds": 1, "seed": 1}, "model": {**model, **loss}, "training": training})


def trained(sizes: Sequence[int], nodes: Sequence[tuple[Pictures, np.ndarray]], steps: int = 1) -> Round:
    """Have each node train as it would in a run, by Atoll's own learner."""
    batch = max(len(x) for x, _ in nodes)
    learner = learners.build(plan_of(sizes, steps, batch), ["atoll.learners.networks:perceptron"])
    model = learner.initial(1)["parameters"]
    updates = []
    for x, y in nodes:
        fitted = learner.fit({"parameters": model}, Rows(x, y), steps, batch, np.random.default_rng(0)).groups["parameters"]
        updates.append(model.with_values(fitted.values - model.values))
    return Round(model, updates, [len(x) for x, _ in nodes])


def masked(happened: Round) -> tuple[Group, Group]:
    """Run secure aggregation over a round: what the server sees of the first node, and the mean that it comes to know."""
    layouts, nodes = {"parameters": happened.model.layout}, [Identity.new() for _ in happened.updates]
    link = secagg(layouts, metrics=(), clip=CLIP, weight=1000, bits=32)
    terms = Terms("run", round=1, attempt=0, plan="00" * 32, minimum=3, dropout=0.0, corrupt=0)
    own = {node.node: link.join(terms, node) for node in nodes}
    server, said = link.begin(terms), dict.fromkeys(own, b"")
    for phase in link.before:
        answers = {}
        for node in said:
            own[node], answers[node] = link.answer(own[node], phase, said[node])
        server, said = link.collect(server, phase, answers)
    sent = {}
    for node, update, rows in zip([node.node for node in nodes], happened.updates, happened.rows, strict=True):
        own[node], protected = link.protect(own[node], said[node], Update({"parameters": update}, float(rows)))
        sent[node] = protected.groups
    first = sent[nodes[0].node]["parameters"].values.copy()
    total = {
        name: Group(layout, np.sum([groups[name].values for groups in sent.values()], axis=0, dtype=layout.dtype))
        for name, layout in link.updates(layouts).items()
    }
    server, said = link.close(server, sent)
    for phase in link.after:
        answers = {}
        for node in said:
            own[node], answers[node] = link.answer(own[node], phase, said[node])
        if phase != link.after[-1]:
            server, said = link.collect(server, phase, answers)
    undone = link.undo(server, answers, Total(total, 1.0, len(sent), len(nodes)))
    words = Fixed(CLIP, len(nodes), 32, 1000.0).decode(first)
    return happened.model.with_values(words), happened.model.with_values(undone.total.mean("parameters"))


def noised(update: Group, multiplier: float) -> Group:
    """Return an update no longer than `CLIP`, with Gaussian noise of `multiplier` times that in each number."""
    values = update.values * min(1.0, CLIP / float(np.linalg.norm(update.values)))
    if not multiplier:
        return update.with_values(values)
    noise = discrete_gaussian(multiplier * _STEPS, values.size, Keystream(new_secret())) / _STEPS * CLIP
    return update.with_values(values + noise)


def psnr(found: Pictures, true: Pictures) -> float:
    """Return how close pictures are to others, in decibels: 10 log₁₀(1 / mean squared error)."""
    error = float(np.mean(np.square(np.clip(found, 0, 1) - true)))
    return -10 * math.log10(max(error, 1e-12))
