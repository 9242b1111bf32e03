"""A table of methods, and what each of them holds to: its paper's equations, the same bits everywhere, a memory that survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.faults.test_memory import live
from tests.federation import plan, rows, run

from atoll.algorithms import find, known
from atoll.errors import PlanError
from atoll.learners import build
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.server.close import step
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.testing import check_algorithm
from atoll.vector import Update

Vector = np.ndarray
Site = tuple[Vector, Vector]
ROUNDS, STEPS, ETA = 3, 4, 0.5
SIZES = (40, 24, 8)


def sites() -> list[Site]:
    """Three nodes whose classes are cut by different planes."""
    drawn = []
    for k, size in enumerate(SIZES):
        x, _ = rows(k, size)
        drawn.append((x, (x @ [1.0, k, -k, 1.0] > 0).astype(float)))
    return drawn


def alike() -> list[Site]:
    """Three nodes that each have the same row many times: whatever is drawn, a mini-batch is the same."""
    return [(np.repeat(x[:1], len(x), axis=0), np.repeat(y[:1], len(y))) for x, y in sites()]


# What the papers say, on all rows at a time, written as naively as can be.


def slope(w: Vector, site: Site) -> Vector:
    x, y = np.column_stack([site[0], np.ones(len(site[1]))]), site[1]
    return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)


def loss(w: Vector, site: Site) -> float:
    z = np.column_stack([site[0], np.ones(len(site[1]))]) @ w
    return float(np.mean(np.log1p(np.exp(z)) - site[1] * z))


def descend(w: Vector, site: Site, steps: int = STEPS, more: Callable[[Vector], Vector | float] = lambda w: 0.0) -> Vector:
    for _ in range(steps):
        w = w - ETA * (slope(w, site) + more(w))
    return w


def average(vectors: Sequence[Vector], weighted: bool = True) -> Vector:
    return np.average(vectors, axis=0, weights=SIZES if weighted else None)


def fedavg(w: Vector, weighted: bool = True, rounds: int = ROUNDS) -> Vector:
    for _ in range(rounds):
        w = average([descend(w, site) for site in sites()], weighted)
    return w


def fedsgd(w: Vector) -> Vector:
    for _ in range(ROUNDS):
        w = average([w - ETA * slope(w, site) for site in sites()])
    return w


def fedprox(w: Vector, mu: float) -> Vector:
    for _ in range(ROUNDS):
        w = average([descend(w, site, more=lambda v, w=w: mu * (v - w)) for site in sites()])
    return w


def fedasync(w: Vector, mixing: float, rho: float) -> Vector:
    for _ in range(ROUNDS):
        ends = [descend(w, site, more=lambda v, w=w: rho * (v - w)) for site in sites()]
        w = (1 - mixing) * w + mixing * np.mean(ends, axis=0)
    return w


def fedavgm(w: Vector, beta: float, eta: float) -> Vector:
    v = np.zeros_like(w)
    for _ in range(ROUNDS):
        v = beta * v + average([descend(w, site) - w for site in sites()])
        w = w + eta * v
    return w


def fedopt(w: Vector, eta: float, beta: float, tau: float, second: Callable[[Vector, Vector], Vector]) -> Vector:
    m, v = np.zeros_like(w), np.full_like(w, tau**2)
    for _ in range(ROUNDS):
        delta = average([descend(w, site) - w for site in sites()])
        m, v = beta * m + (1 - beta) * delta, second(v, delta**2)
        w = w + eta * m / (np.sqrt(v) + tau)
    return w


def scaffold(w: Vector, option: str, weighted: bool) -> Vector:
    c, own = np.zeros_like(w), [np.zeros_like(w) for _ in SIZES]
    for _ in range(ROUNDS):
        ends, new = [], []
        for site, mine in zip(sites(), own, strict=True):
            y = descend(w, site, more=lambda _, mine=mine, c=c: c - mine)
            ends.append(y)
            new.append(slope(w, site) if option == "I" else mine - c + (w - y) / (STEPS * ETA))
        c = c + average([a - b for a, b in zip(new, own, strict=True)], weighted)
        w, own = w + 0.8 * (average(ends, weighted) - w), new
    return w


def fednova(w: Vector, mu: float) -> Vector:
    for _ in range(ROUNDS):
        directions, shares = [], []
        for site, steps in zip(alike(), (6, 4, 2), strict=True):
            shares.append(sum((1 - ETA * mu) ** j for j in range(steps)))
            end = descend(w, site, steps, more=lambda v, w=w: mu * (v - w))
            directions.append((w - end) / ETA / shares[-1])
        w = w - average(shares) * ETA * average(directions)
    return w


def feddyn(w: Vector, alpha: float) -> Vector:
    h, duals = np.zeros_like(w), [np.zeros_like(w) for _ in SIZES]
    for _ in range(ROUNDS):
        ends = []
        for k, site in enumerate(sites()):
            ends.append(descend(w, site, more=lambda v, w=w, dual=duals[k]: alpha * (v - w) - dual))
            duals[k] = duals[k] - alpha * (ends[-1] - w)
        h = h - alpha * np.mean([end - w for end in ends], axis=0)
        w = np.mean(ends, axis=0) - h / alpha
    return w


def mime_lite(w: Vector, beta: float) -> Vector:
    m = np.zeros_like(w)
    for _ in range(ROUNDS):
        ends = []
        for site in sites():
            y = w
            for _ in range(STEPS):
                y = y - ETA * ((1 - beta) * slope(y, site) + beta * m)
            ends.append(y)
        w, m = average(ends), (1 - beta) * average([slope(w, site) for site in sites()]) + beta * m
    return w


def qffl(w: Vector, q: float, lipschitz: float) -> Vector:
    for _ in range(ROUNDS):
        up, down = 0.0, 0.0
        for site in sites():
            f, move = loss(w, site), lipschitz * (w - descend(w, site))
            up = up + f**q * move
            down += q * f ** (q - 1) * float(move @ move) + lipschitz * f**q
        w = w - up / down
    return w


# Methods with a model of each node's own: the federation's, and these.


def fedper(w: Vector) -> tuple[Vector, list[Vector]]:
    mine = [np.zeros(1) for _ in SIZES]
    for _ in range(ROUNDS):
        ends = [descend(np.append(w[:4], own), site) for own, site in zip(mine, sites(), strict=True)]
        w, mine = np.append(average(ends)[:4], 0.0), [end[4:] for end in ends]
    return w, [np.append(w[:4], own) for own in mine]


def finetune(w: Vector, steps: int) -> tuple[Vector, list[Vector]]:
    w = fedavg(w)
    return w, [descend(w, site, steps) for site in sites()]


def ditto(w: Vector, pull: float) -> tuple[Vector, list[Vector]]:
    mine = [w for _ in SIZES]
    for _ in range(ROUNDS):
        near = [descend(v, site, more=lambda u, w=w: pull * (u - w)) for v, site in zip(mine, sites(), strict=True)]
        w, mine = average([descend(w, site) for site in sites()]), near
    return w, mine


def apfl(w: Vector, alpha: float) -> tuple[Vector, list[Vector]]:
    mine = [w for _ in SIZES]
    for _ in range(ROUNDS):
        ends = []
        for k, site in enumerate(sites()):
            y = w
            for _ in range(STEPS):
                down = slope(alpha * mine[k] + (1 - alpha) * y, site)
                y, mine[k] = descend(y, site, 1), mine[k] - ETA * alpha * down
            ends.append(y)
        w = average(ends)
    return w, [alpha * v + (1 - alpha) * w for v in mine]


def ifca(w: Vector, warmup: int) -> tuple[Vector, list[Vector]]:
    w = fedavg(w, rounds=warmup)
    both = list(w + np.random.default_rng(0).normal(0, 0.3, (2, 5)))
    for _ in range(ROUNDS - warmup):
        chosen = [int(np.argmin([loss(one, site) for one in both])) for site in sites()]
        ends = [descend(both[k], site) for k, site in zip(chosen, sites(), strict=True)]
        rows = [sum(size for size, k in zip(SIZES, chosen, strict=True) if k == j) for j in (0, 1)]
        both = [
            sum(size * end for size, end, k in zip(SIZES, ends, chosen, strict=True) if k == j) / rows[j] if rows[j] else both[j]
            for j in (0, 1)
        ]
    assert all(rows), "a test of clusters needs two"
    return np.average(both, axis=0, weights=rows), [min(both, key=lambda one: loss(one, site)) for site in sites()]


def newton(w: Vector, damping: float, ridge: float) -> Vector:
    x, y = (np.concatenate(part) for part in zip(*sites(), strict=True))
    x = np.column_stack([x, np.ones(len(y))])
    for _ in range(ROUNDS):
        chance = 1 / (1 + np.exp(-x @ w))
        hessian = sum(p * (1 - p) * np.outer(row, row) for p, row in zip(chance, x, strict=True))
        w = w - damping * np.linalg.inv(hessian + ridge * np.eye(5)) @ (x.T @ (chance - y))
    return w


class Row(NamedTuple):
    """A method with some options, and what comes of them by its paper."""

    rule: str
    oracle: Callable[[Vector], Vector | tuple[Vector, list[Vector]]]
    options: Mapping[str, Any] = {}
    data: Callable[[], list[Site]] = sites
    training: Mapping[str, Any] = {}


EPOCHS = {"steps": None, "epochs": 2, "batch_size": 16}
ADAM = {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.7, "tau": 0.01}
TABLE = {
    "fedavg": Row("fedavg", fedavg),
    "fedavg, one voice each": Row("fedavg", lambda w: fedavg(w, False), {"weighted": False}),
    "one_shot": Row("one_shot", fedavg, {"models": 3}),
    "one_shot, one voice each": Row("one_shot", lambda w: fedavg(w, False), {"weighted": False, "share": False}),
    "fedsgd": Row("fedsgd", fedsgd),
    "fedavgm": Row("fedavgm", lambda w: fedavgm(w, 0.9, 0.5), {"momentum": 0.9, "learning_rate": 0.5}),
    "fedadam": Row("fedadam", lambda w: fedopt(w, 0.1, 0.8, 0.01, lambda v, d: 0.7 * v + 0.3 * d), ADAM),
    "fedyogi": Row("fedyogi", lambda w: fedopt(w, 0.1, 0.8, 0.01, lambda v, d: v - 0.3 * d * np.sign(v - d)), ADAM),
    "fedadagrad": Row("fedadagrad", lambda w: fedopt(w, 0.1, 0.0, 0.01, np.add), {"learning_rate": 0.1, "tau": 0.01}),
    "fedprox": Row("fedprox", lambda w: fedprox(w, 0.3), {"mu": 0.3}),
    "fedasync": Row("fedasync", lambda w: fedasync(w, 0.6, 0.3), {"rho": 0.3}),
    "scaffold": Row("scaffold", lambda w: scaffold(w, "II", False), {"weighted": False, "learning_rate": 0.8}),
    "scaffold, by rows": Row("scaffold", lambda w: scaffold(w, "II", True), {"learning_rate": 0.8}),
    "scaffold, option I": Row("scaffold", lambda w: scaffold(w, "I", True), {"learning_rate": 0.8, "option": "I"}),
    "fednova": Row("fednova", lambda w: fednova(w, 0.0), {}, alike, EPOCHS),
    "fednova, pulled": Row("fednova", lambda w: fednova(w, 0.3), {"mu": 0.3}, alike, EPOCHS),
    "feddyn": Row("feddyn", lambda w: feddyn(w, 0.2), {"alpha": 0.2}),
    "mime_lite": Row("mime_lite", lambda w: mime_lite(w, 0.7), {"momentum": 0.7}),
    "qffl": Row("qffl", lambda w: qffl(w, 2.0, 1 / ETA), {"q": 2.0}),
    "qffl, L given": Row("qffl", lambda w: qffl(w, 0.5, 3.0), {"q": 0.5, "lipschitz": 3.0}),
    "fedper": Row("fedper", fedper, {"personal": ["bias"]}),
    "fedbn": Row("fedbn", fedper, {"personal": ["b*"]}),
    "finetune": Row("finetune", lambda w: finetune(w, STEPS)),
    "finetune, two steps": Row("finetune", lambda w: finetune(w, 2), {"steps": 2}),
    "ditto": Row("ditto", lambda w: ditto(w, 0.3), {"pull": 0.3}),
    "apfl": Row("apfl", lambda w: apfl(w, 0.3), {"alpha": 0.3}),
    "ifca": Row("ifca", lambda w: ifca(w, 1), {"clusters": 2, "spread": 0.3, "warmup": 1}),
    "ifca, as in its paper": Row("ifca", lambda w: ifca(w, 0), {"spread": 0.3, "warmup": 0}),
    "newton": Row("newton", lambda w: newton(w, 1.0, 1.0)),
    "newton, damped": Row("newton", lambda w: newton(w, 0.5, 3.0), {"damping": 0.5, "ridge": 3.0}),
}
"""A new method is a row here."""


def agreed(name: str, **more: Mapping[str, Any]) -> Plan:
    return plan(
        plan={"rounds": ROUNDS},
        training={"epochs": None, "steps": STEPS, "batch_size": max(SIZES), "learning_rate": ETA, **TABLE[name].training},
        aggregation={"rule": TABLE[name].rule, "options": dict(TABLE[name].options)},
        cohort={"minimum": 3, "quorum": 1.0, "deadline": 20},
    ).with_(**more)


def people(name: str) -> dict[str, Site]:
    return {f"node-{k}": site for k, site in enumerate(TABLE[name].data())}


@pytest.mark.parametrize("name", TABLE)
def test_a_method_is_what_its_paper_says(name):
    found = simulate(agreed(name), people(name))
    expected = TABLE[name].oracle(np.zeros(5))
    model, own = expected if isinstance(expected, tuple) else (expected, [expected] * len(SIZES))
    np.testing.assert_allclose(found.model["parameters"].values, model, rtol=1e-9, atol=1e-12)
    losses = [loss(one, site) for one, site in zip(own, TABLE[name].data(), strict=True)]
    np.testing.assert_allclose([judged["loss"] for judged in found.by_node.values()], losses, rtol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_passes_the_suite(name):
    small = agreed(name, training={"batch_size": 16})
    learner = build(small)
    check_algorithm(lambda: find(small, learner), learner, [prepare(one, small) for one in people(name).values()])


@pytest.mark.parametrize("name", TABLE)
def test_a_deployed_run_has_the_bits_of_a_simulated_one(name, tmp_path):
    """Nodes answer in any order, and what they remember lies on their disks."""
    small = agreed(name, training={"batch_size": 8})
    simulated = simulate(small, people(name))
    assert simulate(small, dict(reversed(people(name).items()))).digest == simulated.digest
    history = run(small, people(name), tmp_path)
    assert history["last"] == simulated.digest
    assert history["rounds"][-1]["by_node"] == simulated.by_node
    personal = [(tmp_path / node / "personal.safetensors").exists() for node in simulated.by_node]
    assert personal == [find(small, build(small)).own is not None] * len(SIZES)


KILLS = [("verdict", 1), ("trained", 2), ("sent", 3)]
"""When a node is killed: right after it told of this, of this round."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["feddyn", "ditto", "apfl", "fedper", "fedavg"])
def test_a_killed_node_goes_on_with_what_its_method_remembered(name, tmp_path):
    """By kill -9; `scaffold` is killed in tests/faults/test_memory.py, `moon` has a test of its own."""
    small = agreed(name, training={"batch_size": 8}, cohort={"deadline": 120}, compression={"up": ["topk:0.5"]})
    data = people(name)
    np.savez(tmp_path / "node-1.npz", x=data["node-1"][0], y=data["node-1"][1])

    async def together() -> dict[str, Any]:
        server = Server(small, store=tmp_path / "store", port=0)
        others = [Node(server.url, data[one], name=one, directory=tmp_path / one) for one in ("node-0", "node-2")]
        killed = asyncio.to_thread(live, tmp_path, server.url, "node-1", KILLS)
        history, *_ = await asyncio.gather(server.serve_async(), killed, *(node.start_async() for node in others))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 200))
    simulated = simulate(small, data)
    assert history["last"] == simulated.digest
    assert history["rounds"][-1]["by_node"] == simulated.by_node


def test_cyclic_weight_transfer_hands_the_model_on():
    """Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging": no mean of anything."""
    found = simulate(agreed("fedavg", plan={"rounds": 7}, cohort={"minimum": 1, "cycle": 3}), people("fedavg"))
    w = np.zeros(5)
    for row in found.rounds:
        w = descend(w, people("fedavg")[row["answered"][0]])
    assert len({row["answered"][0] for row in found.rounds[:3]}) == 3
    np.testing.assert_allclose(found.model["parameters"].values, w, rtol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_with_nobody_late_a_buffered_run_is_a_synchronous_one(name):
    buffered = agreed(name).with_(cohort={"buffer": 3})
    if find(agreed(name), build(agreed(name))).late is None:
        with pytest.raises(PlanError, match="can fold no late update, so its rounds are synchronous"):
            simulate(buffered, people(name))
    else:
        assert simulate(buffered, people(name)).digest == simulate(agreed(name), people(name)).digest


@pytest.mark.parametrize(
    ("rule", "options", "kept"),
    [
        ("fedavg", {}, lambda late: (1 + late) ** -0.5),
        ("fedprox", {}, lambda late: (1 + late) ** -0.5),
        ("fedasync", {"mixing": 1.0}, lambda late: (1 + late) ** -0.5),
        ("fedasync", {"mixing": 1.0, "a": 0.9}, lambda late: (1 + late) ** -0.9),
        ("fedasync", {"mixing": 1.0, "staleness": "constant"}, lambda late: 1.0),
        ("fedasync", {"mixing": 1.0, "staleness": "hinge"}, lambda late: 1.0 if late <= 4 else 1 / (10 * (late - 4) + 1)),
        (
            "fedasync",
            {"mixing": 1.0, "staleness": "hinge", "a": 2.0, "b": 1},
            lambda late: 1 / (2 * late - 1) if late > 1 else 1.0,
        ),
    ],
)
def test_a_late_update_keeps_a_part_of_its_step(rule, options, kept):
    made = plan(aggregation={"rule": rule, "options": options})
    learner = build(made)
    method = find(made, learner)
    state = method.init(learner.initial(0))
    move = state["parameters"].with_values(np.arange(5.0) + 1)
    for late in range(8):
        after = step(
            method, state, learner.layouts, {"n": Update({"parameters": move}, 7.0)}, 1, late={"n": late} if late else {}
        )
        np.testing.assert_allclose(after["parameters"].values, kept(late) * move.values, rtol=1e-15)


def test_fedasync_makes_a_model_of_every_update(tmp_path):
    asynchronous = agreed(
        "fedasync", plan={"rounds": 9}, cohort={"minimum": 1, "buffer": 1}, training={"steps": None, "epochs": 1, "batch_size": 4}
    )
    run = simulate(asynchronous, people("fedasync"))
    assert [len(row["answered"]) for row in run.rounds] == [1] * 9
    assert any(row["late"] for row in run.rounds)


ROBUST = "median trimmed_mean krum multi_krum bulyan geometric_median norm_clipping centered_clipping fltrust"
"""Rules with tests of their own."""


def test_every_method_has_a_row():
    assert {row.rule for row in TABLE.values()} >= known().keys() - {"moon", "bagging", "histograms", *ROBUST.split()}


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("fedprox", {"mu": -1}, "mu: it is not negative; it is -1"),
        ("fedavgm", {"momentum": 1.0}, r"momentum: it lies in \[0, 1\); it is 1.0"),
        ("fedadam", {"tau": 0}, "tau: it is above 0; it is 0"),
        ("fedyogi", {"beta_2": 2}, r"beta_2: it lies in \[0, 1\); it is 2"),
        ("fednova", {"mu": -1}, "mu: it is not negative; it is -1"),
        ("feddyn", {"alpha": 0}, "alpha: it is above 0; it is 0"),
        ("mime_lite", {"momentum": 1}, r"momentum: it lies in \[0, 1\); it is 1"),
        ("qffl", {"q": -2}, "q: it is not negative; it is -2"),
        ("qffl", {"lipschitz": 0}, "lipschitz: it is above 0; it is 0"),
        ("finetune", {"steps": 0}, "steps: it is a whole number from 1 up; it is 0"),
        ("ditto", {"pull": -1}, "pull: it is not negative; it is -1"),
        ("apfl", {"alpha": 2}, r"alpha: it lies in \[0, 1\]; it is 2"),
        ("ifca", {"clusters": 1}, "clusters: it is a whole number from 2 up; it is 1"),
        ("ifca", {"warmup": -1}, "warmup: it is a whole number from 0 up; it is -1"),
        ("one_shot", {"models": 0}, "models: it is a whole number from 1 up; it is 0"),
        ("one_shot", {"epochs": 1.5}, "epochs: it is a whole number from 1 up; it is 1.5"),
        ("fedper", {"personal": "bias"}, "personal: is a list of names of arrays"),
        ("fedper", {"personal": ["beta"]}, r"personal: \['beta'\] fits no array of the model; it has kernel, bias"),
        ("fedper", {"personal": ["*"]}, r"personal: \['\*'\] fits every array of the model"),
        ("fedbn", {}, "personal: .* fits no array of the model"),
        ("fedasync", {"mixing": 0}, r"mixing: it lies in \(0, 1\]; it is 0"),
        ("fedasync", {"staleness": "linear"}, "staleness: it is one of constant, polynomial, hinge; it is 'linear'"),
        ("fedasync", {"a": 0}, "a: it is above 0; it is 0"),
        ("scaffold", {"option": "III"}, "option: it is one of I, II; it is 'III'"),
        ("scaffold", {"optoin": "I"}, "optoin: 'scaffold' has no such option; did you mean 'option'?"),
    ],
)
def test_an_option_out_of_its_range_is_named(rule, options, said):
    wrong = plan(aggregation={"rule": rule, "options": options})
    with pytest.raises(PlanError, match=f"aggregation.options.{said}"):
        find(wrong, build(wrong))


@pytest.mark.parametrize(
    ("rule", "model", "said"),
    [
        ("scaffold", {"sklearn": "SGDClassifier"}, "let a method change each gradient and take plain steps"),
        ("fedprox", {"sklearn": "LogisticRegression"}, "let a method change each gradient; 'sklearn' as planned can't"),
    ],
)
def test_a_learner_that_cannot_do_what_a_method_needs_is_named(rule, model, said):
    wrong = plan(model={"logistic": False, **model}, training={"epochs": None, "steps": 3}, aggregation={"rule": rule})
    with pytest.raises(PlanError, match=f"aggregation.rule: '{rule}' needs a learner that can {said}"):
        find(wrong, build(wrong))
