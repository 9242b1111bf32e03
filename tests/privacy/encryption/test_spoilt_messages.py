"""Every message of an encrypted sum, spoilt in every way: read or refused by name, and costing its sender only."""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.privacy.secagg.test_spoilt_messages import spoilt

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.privacy.encryption import node, server
from atoll.privacy.encryption.update import CIPHERTEXTS, TAG, Code
from atoll.privacy.secagg import server as gathering
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Group, Layout, Tensor, Update

TERMS = Terms("r", 1, 0, "00" * 32, 3, 0.2, 0)
CODE = Code({"parameters": Layout((Tensor("kernel", (4,)),))}, (), 1.0, 10, 5)
budget = settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True, database=None, deadline=None)


class Whole:
    """One honest sum of five nodes, with every message and every state of it."""

    def __init__(self) -> None:
        who = {one.node: one for one in (Identity.of(f"e{number}") for number in range(5))}
        self.me, self.who = min(who), who
        self.update = Update({"parameters": Group(CODE.layouts["parameters"], np.full(4, 0.5, np.float32))}, 1.0)
        self.told = {one: node.advertise(TERMS, identity) for one, identity in who.items()}
        self.gathered, self.cohort = gathering.gather(TERMS, {one: letter for one, (_, letter) in self.told.items()})
        self.given = {one: node.give(self.told[one][0], self.cohort) for one in who}
        self.secrets = {one: letter for one, (_, letter) in self.given.items()}
        self.relayed, self.tables = server.relay(self.gathered, self.secrets)
        sent = {one: node.protect(self.given[one][0], self.tables[one], self.update, CODE) for one in who}
        self.states = {one: state for one, (state, _) in sent.items()}
        self.closed, self.survivors = gathering.close(self.relayed, who)
        self.signed = {one: node.confirm(self.states[one], self.survivors, who[one]) for one in who}
        _, self.proof = gathering.prove(self.closed, {one: letter for one, (_, letter) in self.signed.items()})
        self.sums = {
            name: Group(layout, sum(update.groups[name].values for _, update in sent.values()))
            for name, layout in CODE.protected.items()
        }
        self.opened = node.reveal(self.signed[self.me][0], self.proof, self.sums, CODE)


@cache
def whole() -> Whole:
    return Whole()


@budget
@given(st.data())
def test_a_node_reads_or_refuses_by_name(data):
    w = whole()
    with contextlib.suppress(PrivacyError):
        node.give(w.told[w.me][0], data.draw(spoilt(w.cohort)))
    with contextlib.suppress(PrivacyError):
        node.protect(w.given[w.me][0], data.draw(spoilt(w.tables[w.me])), w.update, CODE)
    with contextlib.suppress(PrivacyError):
        node.confirm(w.states[w.me], data.draw(spoilt(w.survivors)), w.who[w.me])
    with contextlib.suppress(PrivacyError):
        assert node.reveal(w.signed[w.me][0], data.draw(spoilt(w.proof)), w.sums, CODE) == w.opened


@budget
@given(st.data())
def test_a_node_never_opens_spoilt_ciphertexts(data):
    w = whole()
    name = data.draw(st.sampled_from([CIPHERTEXTS, TAG]))
    values = w.sums[name].values.copy()
    values[data.draw(st.integers(0, values.size - 1))] ^= np.uint64(data.draw(st.integers(1, (1 << 64) - 1)))
    if name == TAG and (values % np.uint64(2**32 - 5) == w.sums[TAG].values % np.uint64(2**32 - 5)).all():
        return  # a tag counts modulo its prime
    with pytest.raises(PrivacyError, match="isn't the sum of the 5 survivors"):
        node.reveal(w.signed[w.me][0], w.proof, {**w.sums, name: Group(w.sums[name].layout, values)}, CODE)


@budget
@given(st.data())
def test_a_server_lets_a_spoilt_message_cost_its_sender_only(data):
    w = whole()
    liar = data.draw(st.sampled_from(sorted(w.who)))
    others = w.who.keys() - {liar}
    relayed, _ = server.relay(w.gathered, {**w.secrets, liar: data.draw(spoilt(w.secrets[liar]))})
    assert {w.gathered.cohort.places[one] for one in others} <= relayed.sharers
    opened, faults = server.compare({**dict.fromkeys(w.who, w.opened), liar: data.draw(spoilt(w.opened))}, CODE, 5)
    assert CODE.agree(opened, w.opened)
    assert faults.keys() <= {liar}
