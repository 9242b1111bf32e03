"""A secure sum is the plain sum, exactly, for any cohort, any dimension, and whoever drops out when."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import PlanError, PrivacyError
from atoll.keys import Identity
from atoll.privacy.graph import graph
from atoll.privacy.secagg.terms import LARGEST, RECORD, SECRET, SHARES, SIGNATURE, Terms
from atoll.privacy.secagg.together import PHASES, secure_sum


@cache
def nodes(count: int) -> tuple[Identity, ...]:
    return tuple(Identity.of(f"node {number}") for number in range(count))


def terms(dropout: float = 0.0, corrupt: int = 0, minimum: int = 3, number: int = 1, roster=None) -> Terms:
    return Terms("r", number, 0, "ab" * 32, minimum, dropout, corrupt, roster)


def updates(identities, sizes, rng):
    """Return one update a node: parts of random words, modulo 2³² and 2⁶⁴ in turn."""
    return {
        one.node: [rng.integers(0, 2**bits, size, f"uint{bits}") for size, bits in zip(sizes, (16, 32, 64) * len(sizes))]
        for one in identities
    }


def plain(given, survivors):
    return [np.sum(parts, axis=0, dtype=parts[0].dtype) for parts in zip(*(given[one] for one in survivors))]


def check(of_terms, identities, given, lost):
    before = {one: [part.copy() for part in parts] for one, parts in given.items()}
    summed = secure_sum(of_terms, identities, given, lost)
    for part, expected in zip(summed.parts, plain(before, summed.survivors)):
        assert part.dtype == expected.dtype
        assert (part == expected).all()
    return summed


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 20), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from([0.0, 0.2, 0.4]), st.data())
def test_any_small_cohort_any_dimension_any_dropouts(count, sizes, dropout, data):
    identities, tolerated = nodes(count), int(dropout * count + 1e-9)
    everybody = [one.node for one in identities]
    gone = data.draw(st.lists(st.sampled_from(everybody), unique=True, max_size=min(tolerated, count - 3)))
    when = data.draw(st.lists(st.sampled_from(PHASES[1:]), min_size=len(gone), max_size=len(gone)))
    lost = {phase: [one for one, at in zip(gone, when) if at == phase] for phase in PHASES}
    rng = np.random.default_rng(count)
    summed = check(terms(dropout), identities, updates(identities, sizes, rng), lost)
    assert set(summed.survivors) == set(everybody) - set(lost["shares"]) - set(lost["masked"])
    assert not summed.faults


@settings(deadline=None, max_examples=2)
@given(st.integers(21, 200), st.sampled_from([0.05, 0.1, 0.2]), st.integers(0, 2**32), st.data())
def test_any_large_cohort_any_dropouts(count, dropout, seed, data):
    identities, rng = nodes(count), np.random.default_rng(seed)
    everybody = [one.node for one in identities]
    gone = rng.permutation(everybody)[: data.draw(st.integers(0, int(dropout * count + 1e-9)))].tolist()
    lost = {
        phase: list(part) for phase, part in zip(PHASES[1:], np.array_split(gone, np.sort(rng.integers(0, len(gone) + 1, 3))))
    }
    summed = check(
        terms(dropout, minimum=count // 2), identities, updates(identities, [data.draw(st.integers(0, 50))], rng), lost
    )
    assert set(summed.survivors) == set(everybody) - set(lost["shares"]) - set(lost["masked"])
    assert not summed.faults


@pytest.mark.parametrize("count", [51, 200])
def test_large_cohorts_lose_a_tenth_over_all_phases(count):
    identities = nodes(count)
    gone = [one.node for one in identities][: count // 10]
    lost = {phase: gone[place :: len(PHASES) - 1] for place, phase in enumerate(PHASES[1:])}
    summed = check(terms(0.1, count // 10), identities, updates(identities, [5, 3], np.random.default_rng(0)), lost)
    assert len(summed.survivors) == count - len(lost["shares"]) - len(lost["masked"])
    assert max(summed.sent, summed.received) < 512 << 10


def test_a_hundred_rounds_in_a_row():
    identities, rng = nodes(5), np.random.default_rng(0)
    for number in range(110):
        lost = {PHASES[1 + number % 4]: [identities[number % 5].node]}
        check(terms(0.2, number=number), identities, updates(identities, [6], rng), lost)


def test_a_large_update():
    identities = nodes(4)
    check(terms(0.25), identities, updates(identities, [300_001, 2], np.random.default_rng(0)), {"masked": [identities[0].node]})


@pytest.mark.parametrize("phase", PHASES)
def test_one_dropout_too_many_abandons_the_round_and_says_where(phase):
    identities = nodes(8)  # 2 may drop out: 5 must stay
    given = updates(identities, [50], np.random.default_rng(0))
    before = {one: parts[0].copy() for one, parts in given.items()}
    gone = [one.node for one in identities[: 5 if phase == "unmask" else 4]]
    words = {
        "keys": "a cohort of 4 nodes: at least 5",
        "shares": "only 4 of 8 nodes gave shares: it takes 5",
        "masked": "only 4 of 8 nodes sent an update: it takes 5",
        "survivors": "only 4 of 8 survivors signed: it takes 5",
        "unmask": "can't be had: 3 shares: it takes 4",
    }
    with pytest.raises(PrivacyError, match=words[phase]):
        secure_sum(terms(0.25, minimum=5), identities, given, {phase: gone})
    masked = [one for one in given if not (given[one][0] == before[one]).all()]
    assert len(masked) == {"keys": 0, "shares": 0, "masked": 4}.get(phase, 8)


def test_what_was_tolerated_to_the_last_is_reconstructed():
    identities = nodes(9)
    made = graph(9, 0.4, 0)
    assert (made.threshold, made.quorum) == (5, 5)
    lost = {phase: [identities[place].node] for place, phase in enumerate(("masked", "survivors", "unmask"))}
    check(terms(0.4), identities, updates(identities, [20], np.random.default_rng(0)), lost)


def test_a_cohort_beside_the_roster_or_below_three_is_refused():
    with pytest.raises(PlanError, match="fewer than 3"):
        terms(minimum=2)
    with pytest.raises(PrivacyError, match="a cohort of 2 nodes"):
        secure_sum(terms(), nodes(2), {})
    strangers = terms(roster=frozenset(one.node for one in nodes(3)))
    summed = check(strangers, nodes(5), updates(nodes(5), [4], np.random.default_rng(0)), {})
    assert set(summed.faults.values()) == {"not in the roster"}
    assert len(summed.survivors) == 3


def test_no_message_of_the_largest_cohort_is_longer_than_half_a_mebibyte():
    table = LARGEST // 8 + LARGEST * (2 + SHARES)
    assert max(LARGEST * RECORD, table, LARGEST * (2 + SIGNATURE), SECRET + LARGEST * (2 + SECRET)) < 512 << 10
