"""Encrypted sums: the mean of what nodes sent to 10⁻⁵, whatever they are; what can't be encrypted is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import LayoutError, PlanError, PrivacyError
from atoll.privacy import ckks
from atoll.privacy.encryption.server import compare
from atoll.privacy.encryption.tag import Fingerprint, hidden, matches
from atoll.privacy.encryption.update import CIPHERTEXTS, FLOOD, LARGEST, NUMBERS, RING, STEP, TAG, Code, covered
from atoll.vector import Group, Layout, Tensor, Total, Update

KEY = ckks.Key(RING, bytes(32))
LAYOUTS = {"parameters": Layout((Tensor("kernel", (3, 2)), Tensor("bias", (2,))))}


def layouts(size: int) -> dict[str, Layout]:
    return {"parameters": Layout((Tensor("kernel", (size,)),)), "buffers": Layout((Tensor("variance", (2,)),))}


def update(code: Code, seed: int, largest: float, weight: float) -> Update:
    rng = np.random.default_rng(seed)
    groups = {
        "parameters": rng.uniform(-largest, largest, code.layouts["parameters"].size).astype(np.float32),
        "buffers": rng.gamma(2, 50, 2).astype(np.float32),
    }
    return Update({name: Group(code.layouts[name], each) for name, each in groups.items()}, weight, {"loss": 0.125 * seed})


@settings(max_examples=12, deadline=None)
@given(st.integers(1, LARGEST), st.integers(1, 3 * NUMBERS), st.floats(1e-6, 1e6), st.floats(0.001, 1))
def test_the_mean_of_what_was_sent_comes_back(nodes, size, clip, share):
    # Two kinds of updates with other weights, each as often as it takes: sums of so many are what is checked.
    code = Code(layouts(size), ("loss",), clip, 1000.0, nodes)
    kinds = [update(code, 1, clip, 1000.0 * share), update(code, 2, clip / 3, 999.0)]
    times, scale = [nodes - nodes // 2, nodes // 2], ckks.room_for(RING, nodes)
    words = [list(ckks.encrypt(KEY, code.slots(one), scale)) for one in kinds]
    totals = [one * np.uint64(times[0]) + other * np.uint64(times[1]) for one, other in zip(*words, strict=True)]
    opened = code.gather(ckks.decrypt(KEY, totals, scale, ckks.Flood(bytes(32), FLOOD)), nodes)
    total, metrics = code.decode(Total({}, 1.0, nodes, nodes), opened)
    weight = sum(count * one.weight for count, one in zip(times, kinds, strict=True))
    assert total.weight == pytest.approx(weight, rel=1e-12)
    assert metrics == {"loss": pytest.approx(0.125 * times[0] + 0.25 * times[1], abs=1e-6)}
    for name, bound in (("parameters", clip * 1e-5), ("buffers", 1e-2)):
        exact = sum(
            count * one.weight * one.groups[name].values.astype(np.float64) for count, one in zip(times, kinds, strict=True)
        )
        assert np.abs(total.mean(name) - exact / weight).max() <= bound


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 0, 0, 0, 0, 0, 1.5, 0], "array 'bias' holds 1.5, beyond the agreed clip of ±1"),
        ([0, -7, 0, 0, 0, 0, 0, 0], "array 'kernel' holds 7, beyond"),
        ([math.nan] * 8, "array 'kernel' holds nan"),
        ([math.inf] * 8, "array 'kernel' holds inf"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(values, words):
    code = Code(LAYOUTS, (), 1.0, 10, 3)
    with pytest.raises(LayoutError, match=words):
        next(code.slots(Update({"parameters": Group(LAYOUTS["parameters"], np.array(values, np.float32))}, 1.0)))


def test_what_float32_makes_of_the_clip_is_taken():
    code = Code(LAYOUTS, (), 0.1, 10, 3)
    assert float(np.float32(0.1)) > 0.1
    next(code.slots(Update({"parameters": Group(LAYOUTS["parameters"], np.full(8, 0.1, np.float32))}, 10.0)))


@pytest.mark.parametrize(("weight", "metrics"), [(11.0, {}), (0.0, {}), (math.nan, {}), (1.0, {"loss": 1.0})])
def test_weights_and_metrics_that_were_not_agreed_on_are_refused(weight, metrics):
    code = Code(LAYOUTS, (), 1.0, 10, 3)
    with pytest.raises(LayoutError, match=r"weight of|metric .loss. is none"):
        next(code.slots(Update({"parameters": Group(LAYOUTS["parameters"], np.zeros(8, np.float32))}, weight, metrics)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layouts": {"sums": Layout((Tensor("gram", (3,)),), "float64", "plain")}}, "no group of real parameters"),
        ({"clip": 0.0}, "must be above 0"),
        ({"clip": math.inf}, "must be above 0"),
        ({"weight": -1.0}, "must be above 0"),
        ({"nodes": LARGEST + 1}, "up to 1024 can be added"),
    ],
)
def test_plans_that_cannot_be_encrypted_are_refused(changed, words):
    with pytest.raises(PlanError, match=words):
        replace(Code(LAYOUTS, (), 1.0, 10, 3), **changed)


def test_an_encrypted_number_takes_32_bytes():
    code = Code({"parameters": Layout((Tensor("kernel", (10**6,)),))}, ("loss",), 1.0, 10, 100)
    assert sum(layout.nbytes for layout in code.protected.values()) / 10**6 < 32.3


def test_what_a_decryption_tells_of_the_key_is_covered():
    assert covered(10**9, LARGEST) < 2.0**-39
    assert covered(25 * 10**6, 100) < 2.0**-43
    # The flood leaves the sum alone: below a step for small cohorts, and by far within 10⁻⁵ of a mean for the largest.
    for nodes in (3, 100, LARGEST):
        flooded = FLOOD * math.sqrt(RING.degree) / ckks.room_for(RING, nodes)
        assert 6 * (flooded + STEP) / nodes < 1e-8


def test_a_sum_that_opens_to_garbage_is_not_given_away():
    code = Code(LAYOUTS, (), 1.0, 10, 3)
    given = Update({"parameters": Group(LAYOUTS["parameters"], np.zeros(8, np.float32))}, 1.0)
    scale = ckks.room_for(RING, 3)
    words = list(ckks.encrypt(KEY, code.slots(given), scale))
    with pytest.raises(PrivacyError, match="opens to what 3 updates never add up to"):
        code.gather(ckks.decrypt(ckks.Key(RING, b"x" * 32), words, scale), 3)


def answers(code: Code, *changes: dict[int, float]) -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    chunks = [rng.uniform(0, 0.25, NUMBERS).view(np.complex128)]
    out = {}
    for number, change in enumerate(changes):
        opened = bytearray(code.gather(chunks, 3))
        values = np.frombuffer(opened, "<f4", offset=len(opened) - code.layouts["parameters"].nbytes)
        for place, by in change.items():
            values[place] += by
        out[f"n{number}"] = bytes(opened)
    return out


def test_what_nodes_opened_must_agree():
    code = Code(LAYOUTS, ("loss",), 1.0, 10, 3)
    opened, faults = compare(answers(code, {}, {}, {}), code, 3)
    assert len(opened) == code.opened
    assert not faults
    # Machines that compute otherwise in the last bit may be a step apart.
    _, faults = compare(answers(code, {}, {3: 10 * STEP}), code, 3)
    assert not faults
    said = answers(code, {0: 0.5}, {}, {})
    opened, faults = compare(said, code, 3)
    assert opened == said["n1"]
    assert faults == {"n0": "opened the sum to other numbers than the others"}
    for apart in (answers(code, {}, {0: 0.5}), answers(code, {}), answers(code, {}, {}, {0: 0.5}, {1: 0.5}), {}):
        with pytest.raises(PrivacyError, match="no 2 agree"):
            compare(apart, code, 3)
    _, faults = compare({**answers(code, {}, {}), "short": b"1234", "zero": b""} | {"n4": answers(code, {})["n0"]}, code, 3)
    assert set(faults) == {"short", "zero"}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2**16 + 5), st.lists(st.integers(0, 1023), min_size=1, max_size=9, unique=True))
def test_tags_add_up_and_no_other_words_have_them(seed, size, places):
    rng, secret = np.random.default_rng(seed), seed.to_bytes(32, "little")
    words = [rng.integers(0, 1 << 54, size, np.uint64) for _ in places]

    def value(of: np.ndarray) -> list[int]:
        fingerprint = Fingerprint(secret)
        fingerprint.add(of)
        return fingerprint.value

    total = sum(words[1:], words[0])
    tags = sum((hidden(value(one), secret, place) for one, place in zip(words, places)), np.zeros(2, np.uint64))
    assert matches(value(total), tags, secret, places)
    other = total.copy()
    other[rng.integers(size)] ^= np.uint64(1) << np.uint64(rng.integers(64))
    assert not matches(value(other), tags, secret, places)
    assert not matches(value(words[0] * np.uint64(len(places) + 1)), tags, secret, places)
    assert not matches(value(total), tags, secret, [*places, 1024])
    assert not matches(value(total), tags, b"\xff" * 32, places)


def test_the_layouts_of_an_encrypted_update_are_of_numbers_that_add_up():
    protected = Code(LAYOUTS, ("loss",), 1.0, 10, 3).protected
    assert protected.keys() == {CIPHERTEXTS, TAG}
    assert {(layout.dtype, layout.total) for layout in protected.values()} == {("uint64", "plain")}
