"""Buckets of a cohort, each a sum of its own: drawn fairly, and left out by themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import plan

from atoll.errors import PlanError, PrivacyError
from atoll.keys import Identity
from atoll.privacy import bucketing
from atoll.privacy.bucketing import bucketed, draw
from atoll.privacy.choose import link
from atoll.privacy.choose import terms as terms_of
from atoll.privacy.secagg.link import secagg
from atoll.privacy.secagg.terms import Terms
from atoll.testing.links import LAYOUTS
from atoll.vector import Group, Total, Update

MODEL = "0" * 64
SMALL = {"parameters": LAYOUTS["parameters"]}
LINK = secagg(SMALL, ("samples",), 1.0, 100, 64)
MEDIAN = plan(
    aggregation={"rule": "median"}, cohort={"minimum": 12}, privacy={"secure_aggregation": True, "buckets": 4, "corrupt": 1}
)


def terms(model: str = MODEL, round_: int = 1, attempt: int = 1) -> Terms:
    return Terms("run", round_, attempt, MODEL, 3, 0.2, 0, None, model)


@given(st.integers(3, 200), st.integers(1, 12))
def test_each_node_is_in_one_bucket_and_sizes_differ_by_one_at_most(nodes, count):
    names = [f"{number:03}" for number in range(nodes)]
    buckets = draw(terms(), names, count)
    assert sorted(node for bucket in buckets for node in bucket) == names
    assert max(map(len, buckets)) - min(map(len, buckets)) <= 1


def test_a_round_draws_other_buckets_and_a_repeated_try_the_same():
    names = [f"node-{number}" for number in range(40)]
    first = draw(terms(), names, 4)
    assert draw(terms(attempt=2), names, 4) == first
    assert draw(terms(round_=2), names, 4) != first
    assert draw(terms("1" * 64), names, 4) != first


def test_two_nodes_meet_as_often_as_by_chance():
    met = np.zeros((12, 12))
    names = [str(number) for number in range(12)]
    for round_ in range(2000):
        for bucket in draw(terms(round_=round_), names, 4):
            places = [int(name) for name in bucket]
            met[np.ix_(places, places)] += 1
    apart = met[~np.eye(12, dtype=bool)] / 2000
    assert abs(apart.mean() - 2 / 11) < 1e-9
    assert abs(apart - 2 / 11).max() < 0.045  # five deviations of so many draws


class Try:
    """Twelve nodes in four buckets, in the hands of an honest server; `lose` says whose answers in a phase never come."""

    def __init__(self, lose: Callable[[str, bucketing._Split], set[str]]) -> None:
        self.link, self.lose = bucketed(LINK, 4, 3, 3), lose
        who = {one.node: one for one in (Identity.of(f"bucket {number}") for number in range(12))}
        self.own = {node: self.link.join(terms(), one) for node, one in who.items()}
        self.server = self.link.begin(terms())
        self.said = dict.fromkeys(sorted(who), b"")
        for phase in self.link.before:
            self.step(phase)

    def step(self, phase: str) -> None:
        self.server, self.said = self.link.collect(self.server, phase, self.answers(phase))

    def answers(self, phase: str) -> dict[str, bytes]:
        gone, out = self.lose(phase, self.server), {}
        for node in self.said:
            if node not in gone:
                self.own[node], out[node] = self.link.answer(self.own[node], phase, self.said[node])
        return out

    def whole(self, weights: Callable[[str], float] = lambda _: 10.0) -> list[Total | str]:
        """Go through all phases; return what is opened of each bucket, or why it isn't."""
        gone, updates = self.lose("update", self.server), {}
        for node in self.said:
            if node not in gone:
                groups = {"parameters": Group(SMALL["parameters"], np.full(24, 0.5, np.float32))}
                update = Update(groups, weights(node), {"samples": 1.0})
                self.own[node], updates[node] = self.link.protect(self.own[node], self.said[node], update)
        self.server, self.said = self.link.close(self.server, list(updates))
        self.step("survivors")
        answers, found = self.answers("unmask"), list[Total | str]()
        split = bucketing.apart(self.link, self.server)
        assert split
        for nodes in split(updates):
            words = {name: sum(updates[node].groups[name].values for node in nodes) for name in updates[nodes[0]].groups}
            groups = {name: Group(updates[nodes[0]].groups[name].layout, np.asarray(value)) for name, value in words.items()}
            try:
                undone = bucketing.undo(self.link, self.server, answers, Total(groups, float(len(nodes)), len(nodes), 12), nodes)
                found.append(undone.total)
            except PrivacyError as error:
                found.append(str(error))
        return found


def nobody(_phase: str, _state: object) -> set[str]:
    return set()


@pytest.mark.parametrize(
    ("phase", "count", "why"),
    [
        ("shares", 1, "only 2 of 3 nodes gave shares: it takes 3"),
        ("update", 1, "only 2 of 3 nodes sent an update: it takes 3"),
        ("survivors", 2, "only 1 of 3 survivors signed: it takes 2"),
    ],
)
def test_a_bucket_is_left_out_by_itself_and_its_reason_is_kept(phase, count, why):
    def lose(now: str, state: bucketing._Split) -> set[str]:
        return set(state.buckets[1].nodes[:count]) if now == phase else set()

    found = Try(lose)
    opened = found.whole()
    lost = bucketing.lost(found.link, found.server)
    assert set(lost.values()) == {f"bucket 2 of 4 was left out: {why}"}
    assert len(lost) == 3
    assert [one.weight for one in opened if isinstance(one, Total)] == [30.0] * 3
    for total in opened:
        assert isinstance(total, Total)
        np.testing.assert_allclose(total.mean("parameters"), 0.5, atol=1e-6)


def test_a_bucket_that_gives_too_little_at_the_end_is_not_opened_and_the_others_are():
    def lose(now: str, state: bucketing._Split) -> set[str]:
        return set(state.buckets[2].nodes[:2]) if now == "unmask" else set()

    opened = Try(lose).whole()
    assert [isinstance(one, Total) for one in opened] == [True, True, False, True]
    assert "shares: it takes 2" in str(opened[2])


def test_with_too_few_buckets_nothing_goes_on():
    def lose(now: str, state: bucketing._Split) -> set[str]:
        return {bucket.nodes[0] for bucket in state.buckets[:2]} if now == "shares" else set()

    with pytest.raises(PrivacyError, match="2 buckets are left, and it takes 3: bucket 1 of 4 was left out: only 2 of 3"):
        Try(lose)


def test_who_answers_first_fills_fewer_buckets_where_there_are_fewer():
    split = bucketed(LINK, 4, 3, 3)
    who = {one.node: one for one in (Identity.of(f"bucket {number}") for number in range(11))}
    said = {node: split.answer(split.join(terms(), one), "keys", b"")[1] for node, one in sorted(who.items())}
    state, _ = split.collect(split.begin(terms()), "keys", said)
    assert split.buckets
    assert sorted(len(bucket.nodes) for bucket in split.buckets(state)) == [3, 4, 4]
    with pytest.raises(PrivacyError, match="8 nodes don't fill 3 buckets of 3 nodes or more"):
        split.collect(split.begin(terms()), "keys", dict(list(said.items())[:8]))


def test_weights_that_add_up_to_nothing_open_no_bucket():
    """A node may say any words: here one that takes away its bucket's whole weight, and more."""
    found = Try(nobody)
    spoiler = found.server.buckets[0].nodes[0]

    def spoilt(node: str) -> float:
        return 10.0 if node != spoiler else 1e-9

    coded = found.link.protect
    found.link = found.link._replace(protect=lambda own, message, update: _taken(coded(own, message, update), update))
    opened = found.whole(spoilt)
    assert "its weights add up to -" in str(opened[0])
    assert all(isinstance(one, Total) for one in opened[1:])


def _taken(protected: tuple[object, Update], update: Update) -> tuple[object, Update]:
    """Take more off the hidden weight of the one whose weight is next to nothing than all others have."""
    own, hidden = protected
    if update.weight < 1:
        hidden.groups["hidden"].values[:1] -= np.uint64(1 << 62)
    return own, hidden


def test_each_node_checks_its_own_bucket():
    """A lying server splits as it likes: not below the plan's least, nor so that a node's friends are outnumbered."""
    mine = terms_of(MEDIAN, "run", 1, 1, MODEL)
    assert mine.minimum == 3
    who = [Identity.of(f"bucket {number}") for number in range(12)]
    states = {one.node: LINK.join(mine, one) for one in who}
    told = {node: LINK.answer(own, "keys", b"") for node, own in states.items()}
    two = sorted(states)[:2]
    with pytest.raises(PrivacyError, match="a cohort of 2 nodes: at least 3"):
        LINK.answer(told[two[0]][0], "shares", b"".join(told[node][1] for node in two))
    with pytest.raises(PlanError, match="of 3 nodes 0 may drop out and 2 be corrupt, but 4 must stay"):
        link(MEDIAN.with_(privacy={"corrupt": 2}), SMALL)
