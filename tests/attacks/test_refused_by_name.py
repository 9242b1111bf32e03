"""The bad inputs of guards, each refused in one line that says what is wrong: by whoever meets it first, plan, server or node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.attacks.test_lies_of_a_server import Sum, cohort, terms
from tests.federation import clients, plan

from atoll.errors import AtollError, PolicyError
from atoll.keys import Identity
from atoll.messages import StartTraining
from atoll.node.gate import Gate
from atoll.plan import Plan
from atoll.privacy.dp.account import account
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.packing import pack_table, unpack_table
from atoll.privacy.secagg.terms import SECRET
from atoll.simulate import simulate
from atoll.store.ledger import Ledger
from atoll.wire import Address, seal

MASKS = {"secure_aggregation": True}
NOISE = {"multiplier": 1.0, "delta": 1e-5}


def private(**keys: Any) -> Plan:
    return plan(privacy=keys)


def in_two_roles() -> None:
    s = Sum()
    _, letter = node.advertise(s.terms, s.identities[s.other])
    node.share(s.told[s.me][0], cohort([*s.records(), letter]))


def told_by_the_server(of: Sum, letters: dict[str, bytes]) -> None:
    gathered, _ = server.gather(of.terms, letters)
    raise AtollError("; ".join(gathered.faults.values()))


def replayed_keys() -> None:
    s = Sum()
    letters = {one: letter for one, (_, letter) in s.told.items()}
    told_by_the_server(s, {**letters, s.other: node.advertise(terms(6), s.identities[s.other])[1]})


def anothers_keys() -> None:
    s = Sum()
    letters = {one: letter for one, (_, letter) in s.told.items()}
    told_by_the_server(s, {**letters, s.other: letters[s.third]})


def wrong_shares() -> None:
    s = Sum()
    s.confirm(s.names[:6])
    given = {one: node.unmask(s.signed[one][0], s.proof) for one in s.survivors}
    rows = unpack_table(given[s.me][SECRET:], SECRET, 7)
    given[s.me] = given[s.me][:SECRET] + pack_table({**rows, 6: bytes(32)})
    faults = server.unmask(s.proven, given, [np.zeros(8, np.uint32)])
    raise AtollError("; ".join(f"{one} {why}" for one, why in faults.items()))


REFUSED = {
    "a node in two roles": (in_two_roles, "names a node twice"),
    "a node twice in the roster": (lambda: private(**MASKS, roster=["0" * 32] * 3), "roster names a node twice"),
    "replayed keys": (replayed_keys, "not signed by it"),
    "another node's keys": (anothers_keys, "keys of node"),
    "wrong shares": (wrong_shares, "gave a wrong share of the key of node"),
    "a clip of nothing": (lambda: private(clip=0, central_noise=NOISE), "privacy.clip: the longest that an update may be"),
    "a clip below nothing": (lambda: private(**MASKS, clip=-1.0), "privacy.clip: the longest that an update may be"),
    "δ of one in so many nodes": (
        lambda: simulate(private(clip=1.0, central_noise={**NOISE, "delta": 0.34}), clients()),
        "delta: 0.34 is no less than one in 3 nodes",
    ),
    "δ of one in so many nodes, with their own noise": (
        lambda: simulate(private(clip=1.0, local_noise={**NOISE, "delta": 0.34}), clients()),
        "delta: 0.34 is no less than one in 3 nodes",
    ),
    "δ of one in so many rows": (
        lambda: account(private(example_noise={**NOISE, "clip": 1.0, "delta": 0.025}), 40),
        "delta: 0.025 is no less than one in 40 rows",
    ),
    "a budget that one round spends": (
        lambda: account(private(clip=1.0, central_noise={**NOISE, "budget": 0.1})),
        "budget: one round takes ε",
    ),
    "a cohort under three": (lambda: plan(privacy=MASKS, cohort={"minimum": 2}), "raise cohort.minimum to 3"),
    "a sum under three": (lambda: terms(minimum=2), "fewer than 3 nodes hides nothing"),
    "two nodes shown as a cohort": (
        lambda: node.share((s := Sum(of=terms(minimum=3))).told[s.me][0], b"".join(s.records()[:2])),
        "a cohort of 2 nodes: at least 3",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name(what):
    act, words = REFUSED[what]
    with pytest.raises(AtollError) as error:
        act()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_budget_that_is_spent_already(tmp_path: Path):
    """By the node's own ledger, whatever the server counts; the server's side: tests/privacy/dp/test_central.py."""
    agreed = private(clip=1.0, local_noise={**NOISE, "budget": 20.0})
    ledger, identity = Ledger(tmp_path), Identity.new()
    gate = Gate(None, ledger)
    gate.meets(agreed)
    gate.account = account(agreed)
    assert gate.account
    assert gate.account.most
    for round_ in range(1, gate.account.most + 2):
        task = StartTraining(run="r", round=1 + round_ % 3, attempt=round_, model="0" * 64, deadline=9.0)
        if round_ > gate.account.most:
            with pytest.raises(PolicyError, match=r"the privacy budget is spent: ε .* of 20"):
                gate.check(task)
            break
        gate.check(task)
        envelope = seal(identity, Address("r", task.round, task.attempt, identity.node), agreed.digest, [b"%d" % round_])
        ledger.leaving(envelope, 0.0, "local noise", gate.spent(task))
    ledger.close()
