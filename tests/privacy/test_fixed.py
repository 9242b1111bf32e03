"""Fixed-point numbers: sums are exact, can't run over, and are right on average."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import LayoutError, PlanError
from atoll.keys import Keystream
from atoll.privacy.fixed import Fixed

CODES = st.builds(
    Fixed,
    clip=st.floats(1e-6, 1e6),
    nodes=st.integers(1, 5000),
    bits=st.sampled_from([32, 64]),
    weight=st.floats(1, 1e9),
) | st.builds(Fixed, clip=st.floats(1e-6, 1e6), nodes=st.integers(1, 127), bits=st.just(16), weight=st.floats(1, 1e9))


@given(CODES, st.sampled_from([-1, 1]))
def test_a_whole_cohort_of_extremes_does_not_run_over(code, sign):
    written = code.encode(np.array([sign * code.clip, sign * code.clip * 2]), code.weight)
    steps = [int(one) for one in written.view(f"int{code.bits}")]
    assert abs(sum(steps[:1]) * code.nodes) < 1 << (code.bits - 1)
    assert code.limit / 2.1 < abs(steps[0]) <= code.limit  # and no bit is given away
    assert steps[1] == pytest.approx(steps[0], abs=1)
    total = np.array(steps[:1], f"int{code.bits}").view(f"uint{code.bits}") * np.array(code.nodes, f"uint{code.bits}")
    assert code.decode(total)[0] == pytest.approx(sign * code.clip * code.weight * code.nodes, rel=1 / 100)


@given(st.integers(1, 50), st.integers(0, 2**32), st.sampled_from([16, 32, 64]))
def test_a_sum_is_within_a_step_a_node(nodes, seed, bits):
    code = Fixed(2.0, nodes, bits, 1000)
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(nodes, 7)).clip(-2, 2).astype(np.float32)
    weights = rng.integers(0, 1001, nodes)
    total = np.sum([code.encode(row, float(weight)) for row, weight in zip(values, weights)], axis=0, dtype=f"uint{bits}")
    exact = (values.astype(np.float64) * weights[:, None]).sum(0)
    assert np.abs(code.decode(total) - exact).max() <= nodes * 2.0**-code.exponent


def test_rounding_is_right_on_average():
    code = Fixed(1.0, 1 << 20, 32)  # coarse steps: 2⁻¹⁰
    for share in (0.1, 0.5, 0.93):
        value = (5 + share) * 2.0**-code.exponent
        written = code.encode(np.full(400_000, value)).astype(np.int64)
        assert set(written.tolist()) == {5, 6}
        assert abs((written == 6).mean() - share) < 5 * math.sqrt(share * (1 - share) / 400_000)
        below = code.encode(np.full(400_000, -value)).view(np.int32)
        assert abs((below == -6).mean() - share) < 5 * math.sqrt(share * (1 - share) / 400_000)


def test_whole_numbers_are_written_exactly_and_the_key_decides_the_rest():
    code = Fixed(1e6, 1000, 64)
    counts = np.array([0, 1, 12345, 999_999], np.float64)
    assert (code.decode(code.encode(counts)) == counts).all()
    values = np.random.default_rng(0).normal(size=600_000).astype(np.float32)
    coarse = Fixed(4.0, 100, 32)
    assert (coarse.encode(values, key=bytes(32)) == coarse.encode(values, key=bytes(32))).all()
    assert (coarse.encode(values[:1000], key=bytes(32)) == coarse.encode(values, key=bytes(32))[:1000]).all()
    assert (coarse.encode(values) != coarse.encode(values)).mean() > 0.1


@given(CODES, st.integers(0, 2**32), st.sampled_from([np.float32, np.float64]))
def test_words_are_those_of_exact_arithmetic(code, seed, dtype):
    rng = np.random.default_rng(seed)
    clip, weight = code.clip, code.weight * rng.uniform()
    edges = [clip, -clip, np.nextafter(clip, 0), 2 * clip, -3 * clip, 0.0, 1e-30]
    values = np.concatenate([edges, rng.normal(0, clip, 30)]).astype(dtype)
    fine, drawn = (16, "<u2") if code.bits < 64 else (32, "<u4")
    draws = np.frombuffer(Keystream(bytes(32)).take(values.size * fine // 8), drawn).tolist()
    written = code.encode(values, weight, bytes(32)).view(f"int{code.bits}").tolist()
    for value, draw, steps in zip(values.tolist(), draws, written):
        exact = Fraction(min(max(value, -clip), clip) * math.ldexp(weight, code.exponent))  # one rounding, of the product
        if code.bits < 64:
            assert steps == math.floor((round(exact * 2**fine) + draw) / Fraction(2**fine))
        else:
            assert steps == math.floor(exact) + ((exact - math.floor(exact)) * 2**fine > draw)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("size", [0, 1, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003])
def test_words_do_not_depend_on_blocks(bits, size):
    values = np.random.default_rng(size).normal(0, 0.5, size).astype(np.float32)
    code = Fixed(1.0, 1000, bits, 3)
    written, step = code.encode(values, 2.5, bytes(32)), 2.0**-code.exponent
    assert written.dtype == f"uint{bits}"
    assert np.abs(code.decode(written) - values.clip(-1, 1).astype(np.float64) * 2.5).max(initial=0) <= step
    assert (code.encode(values[: size // 2], 2.5, bytes(32)) == written[: size // 2]).all()
    assert code.decode(written).tolist() == [steps * step for steps in written.view(f"int{bits}").tolist()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(LayoutError, match="NaN or infinity"):
        Fixed(1.0, 3, 64).encode(np.array([0.0, value], np.float32))


@pytest.mark.parametrize("weight", [-1, 101, math.nan])
def test_a_weight_that_was_not_agreed_on_is_refused(weight):
    with pytest.raises(LayoutError, match="weights from 0 to 100"):
        Fixed(1.0, 3, 64, 100).encode(np.zeros(1), weight)


@pytest.mark.parametrize("clip", [0, -1, math.inf, math.nan])
def test_a_clip_that_is_none_is_refused(clip):
    with pytest.raises(PlanError, match="must be above 0"):
        Fixed(clip, 3, 64)


def test_too_many_nodes_for_the_bits_are_refused():
    with pytest.raises(PlanError, match="in a sum of 16777216 nodes, 32 bits leave less than 8 to each; take bits = 64"):
        Fixed(1.0, 1 << 24, 32)
    with pytest.raises(PlanError, match="take bits = 32"):
        Fixed(1.0, 128, 16)
