"""Every message of a secure sum, spoilt in every way: read or refused by name, and never taken for another's."""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.terms import Terms

TERMS = Terms("r", 1, 0, "00" * 32, 3, 0.2, 0)
budget = settings(max_examples=100, suppress_health_check=list(HealthCheck), derandomize=True, database=None, deadline=None)


class Whole:
    """One honest sum of five nodes, with every message and every state of it."""

    def __init__(self) -> None:
        who = {one.node: one for one in (Identity.of(f"s{number}") for number in range(5))}
        self.me, self.who = min(who), who
        self.told = {one: node.advertise(TERMS, identity) for one, identity in who.items()}
        self.keys = {one: letter for one, (_, letter) in self.told.items()}
        self.gathered, self.cohort = server.gather(TERMS, self.keys)
        self.shared = {one: node.share(self.told[one][0], self.cohort) for one in who}
        self.shares = {one: letter for one, (_, letter) in self.shared.items()}
        self.relayed, self.tables = server.relay(self.gathered, self.shares)
        masked = {one: node.mask(self.shared[one][0], self.tables[one], [np.zeros(3, np.uint32)]) for one in who}
        self.masked = masked
        self.closed, self.survivors = server.close(self.relayed, who)
        self.signed = {one: node.confirm(masked[one], self.survivors, who[one]) for one in who}
        self.signatures = {one: letter for one, (_, letter) in self.signed.items()}
        self.proven, self.proof = server.prove(self.closed, self.signatures)
        self.given = {one: node.unmask(self.signed[one][0], self.proof) for one in who}


@cache
def whole() -> Whole:
    return Whole()


@st.composite
def spoilt(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid message after one to three cuts, doublings, flips and insertions; never the valid one."""
    text = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        lo = draw(st.integers(0, len(text)))
        hi = min(len(text), lo + draw(st.integers(0, 100)))
        match draw(st.integers(0, 3)):
            case 0:
                del text[lo:hi]
            case 1:
                text[lo:lo] = text[lo:hi]
            case 2:
                text[lo:hi] = draw(st.binary(max_size=100))
            case 3 if lo < len(text):
                text[lo] ^= 1 << draw(st.integers(0, 7))
    return bytes(text)


def takes(act) -> bool:
    """Say whether a message was taken; whatever is no refusal by name is an error of the test."""
    with contextlib.suppress(PrivacyError):
        act()
        return True
    return False


@budget
@given(st.data())
def test_a_node_takes_no_spoilt_message(data):
    w = whole()
    cohort = data.draw(spoilt(w.cohort))
    assert cohort == w.cohort or not takes(lambda: node.share(w.told[w.me][0], cohort))
    proof = data.draw(spoilt(w.proof))
    assert proof == w.proof or not takes(lambda: node.unmask(w.signed[w.me][0], proof))
    table = data.draw(spoilt(w.tables[w.me]))
    # A set of givers or survivors has no signature yet: what is taken binds the node to just these.
    states = []
    if takes(lambda: states.append(node.mask(w.shared[w.me][0], table, [np.zeros(3, np.uint32)]))):
        (state,) = states
        honest = w.masked[w.me].held
        assert all(honest[giver] == pair for giver, pair in state.held.items())
        assert takes(lambda: node.confirm(state, w.survivors, w.who[w.me])) == (state.sharers == set(range(5)))
    survivors = data.draw(spoilt(w.survivors))
    takes(lambda: node.confirm(w.masked[w.me], survivors, w.who[w.me]))


@budget
@given(st.data())
def test_a_server_lets_a_spoilt_message_cost_its_sender_only(data):
    w = whole()
    liar = data.draw(st.sampled_from(sorted(w.who)))
    others = w.who.keys() - {liar}
    keys = {**w.keys, liar: data.draw(spoilt(w.keys[liar]))}
    gathered, _ = server.gather(TERMS, keys)
    assert others <= gathered.cohort.places.keys()
    relayed, _ = server.relay(w.gathered, {**w.shares, liar: data.draw(spoilt(w.shares[liar]))})
    assert {w.gathered.cohort.places[one] for one in others} <= relayed.sharers
    proven, _ = server.prove(w.closed, {**w.signatures, liar: data.draw(spoilt(w.signatures[liar]))})
    assert {w.gathered.cohort.places[one] for one in others} <= proven.signatures.keys()
    honest, total = [np.zeros(3, np.uint32)], [np.zeros(3, np.uint32)]
    server.unmask(w.proven, w.given, honest)
    server.unmask(w.proven, {**w.given, liar: data.draw(spoilt(w.given[liar]))}, total)
    assert (total[0] == honest[0]).all()
