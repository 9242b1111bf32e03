"""Each stage by itself: nothing is changed on average, errors stay below what papers say, any stretch opens by itself."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.compression import Down, places
from atoll.compression.press import Press, stages
from atoll.compression.quantise import BLOCK
from atoll.compression.rotate import PIECE, hadamard
from atoll.errors import LayoutError, WireError
from atoll.stages import CHOICES, CODES, COMMON, STAGES
from atoll.vector import Group, Layout, Tensor, check_layouts, layouts_of
from atoll.wire import pack, unpack

CHAINS = [
    one.split("+")
    for one in (
        "bfloat16 8bit 4bit rotate topk:0.1 randomk:0.1 powersgd:2 rotate+4bit rotate+8bit topk:0.05+8bit topk:0.2+rotate+4bit "
        "randomk:0.3+bfloat16 powersgd:1+4bit powersgd:3+rotate+8bit"
    ).split()
]
ROUNDED = [["8bit"], ["4bit"], ["rotate", "8bit"], ["rotate", "4bit"]]
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def press(*said: str, seed: int = 3) -> Press:
    return Press(stages(said), seed)


def groups(*shapes: tuple[int, ...], seed: int = 0, dtype: str = "float32", scale: float = 1.0) -> dict[str, Group]:
    layout = Layout(tuple(Tensor(f"t{k}", shape) for k, shape in enumerate(shapes)), dtype)  # type: ignore[arg-type]
    values = np.random.default_rng(seed).standard_t(3, layout.size) * scale
    return {"parameters": Group(layout, values.astype(dtype))}


def through(one: Press, sent: dict[str, Group], round_: int = 1, who: str = "a") -> np.ndarray:
    small, _ = one.encode(sent, {}, round_, who)
    return one.decode(small, layouts_of(sent), round_)["parameters"].values


@pytest.mark.parametrize("said", CHAINS, ids="+".join)
@few
@given(st.integers(2, 20_000), st.integers(0, 99))
def test_what_travels_has_the_layouts_that_the_plan_says_and_any_stretch_opens_by_itself(said, size, seed):
    one, sent = press(*said), groups((size - size // 3,), (size // 3,) if size < 9 else (size // 9, 3), seed=seed)
    layouts = layouts_of(sent)
    small, _ = one.encode(sent, {}, 7, "a")
    check_layouts(small, one.layouts(layouts))
    read_back, _ = unpack(b"".join(pack(small)), one.layouts(layouts))
    whole = one.decode(read_back, layouts, 7)["parameters"]
    assert np.isfinite(whole.values).all()
    read = one.open(read_back, layouts, 7)["parameters"]
    lo, hi = sorted(np.random.default_rng(seed).integers(0, whole.values.size + 1, 2))
    assert read(int(lo), int(hi)).tobytes() == whole.values[lo:hi].tobytes()


@pytest.mark.parametrize("said", CHAINS, ids="+".join)
def test_float64_groups_come_back_as_float64(said):
    sent = groups((40, 30), (7,), dtype="float64")
    assert through(press(*said), sent).dtype == np.float64


@pytest.mark.parametrize("said", CHAINS, ids="+".join)
def test_draws_are_those_of_plan_round_and_node(said):
    sent, one = groups((3000,)), press(*said)
    assert through(one, sent).tobytes() == through(one, sent).tobytes()
    if said[0].startswith(("8", "4", "rotate")) and said != ["rotate"]:
        assert through(one, sent).tobytes() != through(one, sent, who="b").tobytes()
    if "rotate" in said or "randomk:0.3" in said:
        assert through(one, sent).tobytes() != through(one, sent, round_=2).tobytes()


@pytest.mark.parametrize("said", ROUNDED, ids="+".join)
def test_quantising_changes_nothing_on_average(said):
    x, one, draws = np.random.default_rng(0).normal(size=6000).astype(np.float32), press(*said), 400
    sent = {"parameters": Group(Layout((Tensor("t", (6000,)),)), x)}
    found = np.array([through(one, sent, who=f"node-{k}") for k in range(draws)], np.float64)
    spread = found.std(axis=0, ddof=1)
    usual = float(np.median(spread))
    off = (found.mean(axis=0) - x) * math.sqrt(draws)
    assert np.abs(off).max() < 6 * 1.25 * usual, "deviations are half a step at most, and a median of them .4"
    steady = spread > usual / 2
    assert 0.85 < np.mean(np.square(off[steady] / spread[steady])) < 1.15


@pytest.mark.parametrize(("said", "levels"), [(["8bit"], 127), (["4bit"], 7)], ids=["8bit", "4bit"])
def test_the_mean_square_error_of_quantising_is_a_quarter_of_a_step_at_most(said, levels):
    """Alistarh et al. 2017, lemma 3.1 by blocks: of a number between two levels it is p (1 - p) steps squared."""
    sent = groups((100 * BLOCK,))
    x = sent["parameters"].values.astype(np.float64).reshape(-1, BLOCK)
    found = through(press(*said), sent).reshape(-1, BLOCK)
    step = np.abs(x).max(axis=1, keepdims=True) / levels
    part = x / step - np.floor(x / step)
    foreseen = (part * (1 - part) * step**2).sum()
    assert np.square(found - x).sum() == pytest.approx(foreseen, rel=0.05)
    assert foreseen <= BLOCK * (step**2).sum() / 4


def test_rotated_4_bits_keep_the_bound_of_the_paper_where_plain_ones_dont():
    """Suresh et al. 2017, theorem 3 for one vector: E‖error‖² ≤ (2 log d + 2) / (k - 1)² ‖x‖², of k = 15 levels."""
    rng, d = np.random.default_rng(0), PIECE
    x = rng.normal(size=d).astype(np.float32)
    x[::BLOCK] = 50
    sent = {"parameters": Group(Layout((Tensor("t", (d,)),)), x)}
    bound = (2 * math.log(d) + 2) / 14**2
    turned, plain = (
        np.mean([np.square(through(press(*said), sent, who=str(k)) - x).sum() / np.square(x).sum() for k in range(20)])
        for said in (["rotate", "4bit"], ["4bit"])
    )
    assert turned < bound < plain


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
@few
@given(st.integers(1, 3 * BLOCK), st.integers(0, 99), st.sampled_from([1e-30, 1.0, 1e30]))
def test_the_error_of_quantising_is_below_a_step_of_its_block(bits, levels, size, seed, scale):
    sent = groups((size + 1,), seed=seed, scale=scale)
    x, found = sent["parameters"].values, through(press(f"{bits}bit"), sent)
    for lo in range(0, x.size, BLOCK):
        step = np.abs(x[lo : lo + BLOCK]).max() / levels
        assert np.abs(found[lo : lo + BLOCK] - x[lo : lo + BLOCK]).max() <= step * 1.001


@pytest.mark.parametrize("said", ROUNDED, ids="+".join)
def test_zeros_stay_zeros_and_the_tiniest_numbers_do_no_harm(said):
    layout = Layout((Tensor("t", (5000,)),))
    for x in (0.0, 1e-44, 1e-38, -1e-36):
        found = through(press(*said), {"parameters": Group(layout, np.full(5000, x, np.float32))})
        assert np.abs(found - x).max() <= 1e-34


def test_what_bits_take():
    layouts = layouts_of(groups((1_000_000,)))
    sizes = {
        said: sum(layout.nbytes for layout in press(*said.split("+")).layouts(layouts).values()) / 1e6
        for said in ("bfloat16", "8bit", "4bit", "rotate+4bit", "topk:0.01", "topk:0.01+8bit", "topk:0.1+4bit", "randomk:0.01")
    }
    assert sizes == pytest.approx(
        {"bfloat16": 2.0, "8bit": 1.0156, "4bit": 0.5156, "rotate+4bit": 0.5156, "topk:0.01": 0.0578, "topk:0.01+8bit": 0.028,
         "topk:0.1+4bit": 0.1594, "randomk:0.01": 0.04}, abs=1e-3
    )  # fmt: skip


@few
@given(st.lists(st.floats(-1e34, 1e34).map(float), min_size=2, max_size=300))
def test_bfloat16_is_that_of_ml_dtypes(numbers):
    x = np.array(numbers, np.float32)
    found = through(press("bfloat16"), {"parameters": Group(Layout((Tensor("t", (x.size,)),)), x)})
    assert found.tobytes() == x.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()


@pytest.mark.parametrize("size", [1, 2, 8, 32, 1024, PIECE])
def test_hadamard_is_sylvesters_matrix_with_its_halves_in_turn_and_its_own_inverse(size):
    matrix = np.array([[1.0]])
    while len(matrix) < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    a = 1 << (size.bit_length() - 1) // 2
    turned = np.arange(size).reshape(a, size // a).T.reshape(-1)
    x = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    found = hadamard(x.copy())
    np.testing.assert_allclose(found, (x @ matrix / math.sqrt(size))[:, turned], atol=1e-5)
    np.testing.assert_allclose(hadamard(found.copy(), back=True), x, atol=1e-5)


def test_rotation_keeps_lengths_and_leaves_no_number_that_sticks_out():
    x = np.zeros(3 * PIECE + 1000, np.float32)
    x[[5, PIECE + 7, 3 * PIECE + 3]] = 1000.0
    sent = {"parameters": Group(Layout((Tensor("t", (x.size,)),)), x)}
    small, _ = press("rotate").encode(sent, {}, 1, "a")
    assert np.linalg.norm(small["parameters"].values) == pytest.approx(np.linalg.norm(x), rel=1e-5)
    assert np.abs(small["parameters"].values).max() < 50
    np.testing.assert_allclose(through(press("rotate"), sent), x, atol=1e-3)
    plain, turned = through(press("4bit"), groups((50_000,))), through(press("rotate", "4bit"), groups((50_000,)))
    x = groups((50_000,))["parameters"].values  # heavy tails
    assert np.linalg.norm(turned - x) < 0.75 * np.linalg.norm(plain - x)


@few
@given(st.integers(2, 3000), st.sampled_from([0.001, 0.01, 0.3, 1.0]), st.integers(0, 99))
def test_topk_keeps_the_largest_and_leaves_no_more_than_the_paper_says(size, fraction, seed):
    sent = groups((size,), seed=seed)
    x, found = sent["parameters"].values, through(press(f"topk:{fraction}"), sent)
    count = max(1, math.ceil(fraction * size - 1e-9))
    assert np.count_nonzero(found) <= count
    assert (found[found != 0] == x[found != 0]).all()
    assert np.abs(x - found).max() <= np.sort(np.abs(x))[-count]
    assert np.square(x - found).sum() <= (1 - count / size) * np.square(x).sum() * 1.0001


def test_randomk_keeps_each_number_as_often_and_leaves_so_much_on_average():
    sent, rounds = groups((1000,)), 2000
    x = sent["parameters"].values
    found = np.array([through(press("randomk:0.1"), sent, round_) for round_ in range(1, rounds + 1)])
    often = (found != 0).mean(axis=0)
    assert np.abs(often - 0.1).max() < 6 * math.sqrt(0.09 / rounds)
    left = np.square(x - found).sum(axis=1).mean() / np.square(x).sum()
    assert left == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("said", [["rotate"], ["randomk:0.2"]], ids="+".join)
def test_sums_of_what_common_stages_make_are_what_they_make_of_sums(said):
    one, parts = press(*said), [groups((5000,), seed=seed) for seed in range(3)]
    assert all(stage.common for stage in one.stages)
    small = [one.encode(part, {}, 4, f"node-{k}")[0]["parameters"].values for k, part in enumerate(parts)]
    layouts = layouts_of(parts[0])
    summed = {"parameters": Group(one.layouts(layouts)["parameters"], small[0] + small[1] + small[2])}
    apart = sum(through(one, part, 4) for part in parts)
    np.testing.assert_allclose(one.decode(summed, layouts, 4)["parameters"].values, apart, atol=1e-4)


def test_what_plans_check_by_name_is_what_the_stages_are():
    made = {name: stages([name if kind is None else f"{name}:1"])[0] for name, kind in STAGES.items()}
    assert {name for name, stage in made.items() if stage.biased} == set(CHOICES)
    assert {name for name, stage in made.items() if stage.common} == set(COMMON)
    wide = Layout((Tensor("t", (64, 64)),))
    assert {name for name, stage in made.items() if stage.shapes(wide).main.dtype != "float32"} == set(CODES)
    assert all(stage.name == name for name, stage in made.items())


def test_powersgd_sends_a_matrix_of_its_rank_whole_and_gets_nearer_the_best_of_others_every_time():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 50))
    layout = Layout((Tensor("kernel", (60, 5, 10)), Tensor("bias", (50,))))
    sent = {"parameters": Group(layout, np.concatenate([exact.reshape(-1), rng.normal(size=50)]).astype(np.float32))}
    np.testing.assert_allclose(through(press("powersgd:2"), sent), sent["parameters"].values, atol=1e-4)
    matrix = rng.normal(size=(60, 50)) + 3 * exact
    sent = {"parameters": Group(Layout((Tensor("kernel", (60, 50)),)), matrix.reshape(-1).astype(np.float32))}
    best = math.sqrt(np.square(np.linalg.svd(matrix)[1][3:]).sum())
    one, memory, errors = press("powersgd:3"), {}, []
    for round_ in range(1, 40):
        small, memory = one.encode(sent, {key: value for key, value in memory.items() if key.endswith("q")}, round_, "a")
        errors.append(np.linalg.norm(one.decode(small, layouts_of(sent), round_)["parameters"].values - matrix.reshape(-1)))
    assert best <= errors[-1] < 1.01 * best
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("said", [one for one in CHAINS if one[0].startswith(("topk", "randomk", "powersgd"))], ids="+".join)
@settings(few, max_examples=8)
@given(st.integers(0, 99))
def test_nothing_is_lost_for_good(said, seed):
    """What was sent in all, and what is remembered, are what was to be sent, to the last bits of a float64."""
    one, memory, layout = press(*said), {}, layouts_of(groups((30, 20), (11,), dtype="float64"))
    put, came = np.zeros(611), np.zeros(611)
    for round_ in range(1, 15):
        sent = groups((30, 20), (11,), dtype="float64", seed=100 * seed + round_)
        small, memory = one.encode(sent, memory, round_, "a")
        put += sent["parameters"].values
        came += one.decode(small, layout, round_)["parameters"].values
    left = memory["compression.parameters"].values
    np.testing.assert_allclose(came + left, put, rtol=0, atol=1e-12 * np.abs(put).max())


@pytest.mark.parametrize("said", [one for one in CHAINS if one[0].startswith(("topk", "randomk", "powersgd"))], ids="+".join)
def test_what_was_left_out_comes_later(said):
    """The same vector to send every time: what comes is its multiple, but for one memory that doesn't grow."""
    sent, one, memory = groups((40, 25)), press(*said), {}
    sizes = []
    for round_ in range(1, 200):
        _, memory = one.encode(sent, memory, round_, "a")
        sizes.append(np.linalg.norm(memory["compression.parameters"].values))
    assert max(sizes[100:]) < 1.1 * max(sizes[:100])
    assert sizes[-1] < 40 * np.linalg.norm(sent["parameters"].values)


@pytest.mark.parametrize("said", [one for one in CHAINS if one[0].startswith(("topk", "randomk", "powersgd"))], ids="+".join)
def test_steps_lead_nodes_to_a_model_that_stays_and_after_one_that_moves(said):
    """Gruntkowska et al. 2023: what is left of x - R shrinks by the contraction of the stage, and nothing of it is lost."""
    way, dtype = Down(Press(stages(said), 3, "down")), "float64" if said == ["topk:0.1"] else "float32"
    own = {**groups((40, 30), (11,), dtype=dtype), "buffers": groups((5,), seed=9)["parameters"]}
    layouts = layouts_of(own)
    given, step = way.next(own, None, 0)
    assert given is own
    assert step is None
    own = {**groups((40, 30), (11,), seed=1, dtype=dtype), "buffers": groups((5,), seed=8)["parameters"]}
    node, apart = b"".join(pack(given)), []
    for round_ in range(1, 120):
        given, step = way.next(own, given, round_)
        assert step
        node = b"".join(way.followed(node, b"".join(pack(step, {"round": str(round_)})), layouts))
        assert node == b"".join(pack(given)), "a node makes the very bytes"
        assert given["buffers"] == own["buffers"]
        apart.append(np.linalg.norm(given["parameters"].values - own["parameters"].values))
        if round_ < 20:
            own = {**own, "parameters": own["parameters"].with_values(own["parameters"].values * dtype_one(dtype, 1.01))}
    assert apart[-1] < 0.02 * apart[0]


def dtype_one(dtype: str, number: float) -> np.generic:
    return np.dtype(dtype).type(number)


def test_what_isnt_averaged_or_is_one_number_or_buffers_travels_as_it_is():
    three = Layout((Tensor("t", (3,)),))
    sent = {
        "buffers": Group(three, np.ones(3, np.float32)),
        "effective": Group(Layout((Tensor("t", (1,)),), "float64"), np.ones(1)),
        "sums": Group(Layout((Tensor("t", (3,)),), "float64", "plain"), np.ones(3)),
        "counts": Group(Layout((Tensor("t", (3,)),), "int64"), np.ones(3, np.int64)),
        "parameters": Group(three, np.ones(3, np.float32)),
    }
    small, memory = press("topk:0.1", "8bit").encode(sent, {}, 1, "a")
    assert {name: group for name, group in small.items() if name in sent and name != "parameters"} == {
        name: group for name, group in sent.items() if name != "parameters"
    }
    assert {"parameters.topk.places", "parameters.topk.counts", "parameters.8bit.scales"} < small.keys()
    assert memory.keys() == {"compression.parameters"}


@pytest.mark.parametrize("said", CHAINS, ids="+".join)
@pytest.mark.parametrize("number", [1e300, math.nan, math.inf])
def test_numbers_that_cannot_be_compressed_are_said(said, number):
    sent = {"parameters": Group(Layout((Tensor("t", (3, 3)),), "float64"), np.array([1.0] * 8 + [number]))}
    with pytest.raises(LayoutError, match="the update holds NaN or infinity, or is too long to be compressed; lower"):
        press(*said).encode(sent, {}, 1, "a")


def test_an_array_that_powersgd_would_not_make_shorter_travels_whole():
    """A rank as large as the layer: of one layer nothing is cut; where that is so of all, plans are refused."""
    sent = groups((6, 5), (60, 50))
    layouts = layouts_of(sent)
    small, _ = press("powersgd:5").encode(sent, {}, 1, "a")
    assert small["parameters"].values.size == 30 + 5 * (60 + 50)
    assert (through(press("powersgd:5"), sent)[:30] == sent["parameters"].values[:30]).all()
    assert not press("powersgd:5", "8bit").whole(layouts)
    assert press("powersgd:40", "8bit").whole(layouts) == "powersgd"
    assert press("topk:1").whole(layouts) == "topk"


@few
@given(st.data(), st.integers(1, 200_000))
def test_places_are_read_back(data, size):
    count = data.draw(st.integers(1, min(size, 500)))
    chosen = np.sort(np.random.default_rng(count).choice(size, count, replace=False))
    written = places.encode(chosen, size)
    assert {name: group.layout for name, group in written.items()} == places.layouts(size, count)
    assert (places.decode(size, {name: group.values for name, group in written.items()}) == chosen).all()


@pytest.mark.parametrize(
    ("low", "counts"),
    [([1, 1], [2, 0]), ([5, 1], [2, 0]), ([1, 200], [0, 2]), ([1, 2], [1, 0]), ([1, 2], [65535, 65535]), ([1, 2], [2, 1])],
)
def test_places_that_no_encoder_writes_are_refused(low, counts):
    with pytest.raises(WireError, match="places"):
        places.decode(300, {"places": np.array(low, np.uint8), "counts": np.array(counts, np.uint16)})
