"""Updates as bytes: what is packed is unpacked, safetensors agrees, and no damaged byte gets through."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atoll.errors import AtollError, LayoutError, PlanError, WireError
from atoll.keys import Identity, node_of, signed_by
from atoll.plan import Plan
from atoll.vector import Group, Layout, Tensor, Update, check, finite, layouts_of
from atoll.wire import Address, Envelope, decode, encode, pack, seal, unpack

MODEL = "0" * 64


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Group]:
    found = {}
    for name in draw(st.lists(st.sampled_from(["parameters", "buffers", "sums"]), min_size=1, unique=True)):
        dtype = draw(st.sampled_from(["float32", "float64", "int64"]))
        shapes = draw(st.lists(arrays.array_shapes(max_dims=3, max_side=4), min_size=1, max_size=3))
        layout = Layout(tuple(Tensor(f"t{k}", shape) for k, shape in enumerate(shapes)), dtype)
        values = draw(
            arrays.arrays(
                dtype, layout.size, elements={"allow_nan": False, "allow_infinity": False} if dtype != "int64" else None
            )
        )
        found[name] = Group(layout, values)
    return found


@given(groups(), st.floats(1e-3, 1e9), st.dictionaries(st.sampled_from("abc"), st.floats(-1e300, 1e300)))
def test_what_is_encoded_is_decoded_to_the_last_bit(made, weight, metrics):
    body = b"".join(encode(Update(made, weight, metrics), MODEL))
    back = decode(body, layouts_of(made), MODEL)
    assert (back.weight, dict(back.metrics)) == (weight, metrics)
    assert all(back.groups[name] == group for name, group in made.items())


@given(groups())
def test_safetensors_reads_what_is_packed(made):
    read = safetensors.numpy.load(b"".join(pack(made)))
    for name, group in made.items():
        for tensor, array in group.arrays.items():
            np.testing.assert_array_equal(read[f"{name}/{tensor}"], array)


def one_group(size: int = 6) -> dict[str, Group]:
    return {"parameters": Group(Layout((Tensor("w", (size,)),)), np.arange(size, dtype=np.float32))}


def test_a_file_of_safetensors_with_these_arrays_is_read():
    made = one_group()
    body = safetensors.numpy.save({"parameters/w": made["parameters"].values})
    assert unpack(body, layouts_of(made))[0]["parameters"] == made["parameters"]


def test_an_update_is_hardly_longer_than_its_numbers():
    made = one_group(1_000_000)
    size = sum(part.nbytes for part in encode(Update(made, 1.0, {"loss": 1.0}), MODEL))
    assert size <= 1.01 * 4_000_000


BODY = b"".join(encode(Update(one_group(), 2.0, {"loss": 1.0}), MODEL))


@given(st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_an_altered_byte_is_refused_or_is_only_another_number(place, flip):
    altered = bytearray(BODY)
    altered[place] ^= flip
    try:
        update = decode(bytes(altered), layouts_of(one_group()), MODEL)
    except (WireError, LayoutError) as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert update.groups["parameters"].layout == one_group()["parameters"].layout


@given(st.integers(0, len(BODY) - 1))
def test_a_truncated_body_is_refused(length):
    with pytest.raises((WireError, LayoutError)):
        decode(BODY[:length], layouts_of(one_group()), MODEL)


@given(st.binary(min_size=1, max_size=200))
def test_no_bytes_make_the_parser_fail_in_another_way(junk):
    for body in (junk, BODY + junk[:1] + junk, len(junk).to_bytes(8, "little") + junk):
        with pytest.raises(AtollError):
            decode(body, layouts_of(one_group()), MODEL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": None}, "weight, metrics or model are missing"),
        ({"weight": "nan"}, "weight is not positive"),
        ({"weight": (-1.0).hex()}, "weight is not positive"),
        ({"metrics": '{"loss": "inf"}'}, "a metric is not finite"),
        ({"metrics": "[]"}, "missing or damaged"),
        ({"atoll": "2"}, "wire version 2: this side speaks version 1"),
        ({"model": "1" * 64}, "started from model 111111111111, this round's is 000000000000"),
    ],
)
def test_what_is_wrong_with_an_update_is_said(change, said):
    metadata = {"atoll": "1", "model": MODEL, "weight": (1.0).hex(), "metrics": "{}"} | change
    body = b"".join(pack(one_group(), {name: value for name, value in metadata.items() if value is not None}))
    with pytest.raises(WireError, match=said):
        decode(body, layouts_of(one_group()), MODEL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_not_finite_is_found_wherever_it_is(bad, place):
    values = np.zeros(100_000, np.float32)
    assert finite(values)
    values[place] = bad
    assert not finite(values)
    group = Group(Layout((Tensor("a", (50_000,)), Tensor("b", (50_000,)))), values)
    with pytest.raises(LayoutError, match=f"'{'ab'[place >= 50_000]}' in group 'parameters' holds NaN or infinity"):
        check({"parameters": group}, {"parameters": group.layout})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_pass_measures_what_is_averaged(dtype):
    numbers = np.random.default_rng(0).standard_normal(300_000)
    averaged = Group(Layout((Tensor("a", (300_000,)),), dtype), numbers.astype(dtype))
    summed = Group(Layout((Tensor("n", (2,)),), "int64", "plain"), np.array([1 << 62, -1]))
    groups = {"parameters": averaged, "buffers": averaged, "counts": summed}
    assert check(groups, layouts_of(groups)) == pytest.approx(np.sqrt(2) * np.linalg.norm(numbers), rel=1e-5)
    assert check({"counts": summed}, {"counts": summed.layout}) is None
    assert check({"empty": Group(Layout((), dtype), np.empty(0, dtype))}, {"empty": Layout((), dtype)}) == 0.0


@pytest.mark.parametrize(("dtype", "large"), [("float32", 3e38), ("float64", 1e300)])
def test_numbers_too_large_to_be_squared_are_finite_and_long(dtype, large):
    group = Group(Layout((Tensor("a", (2,)),), dtype), np.array([large, 0], dtype))
    found = check({"g": group}, {"g": group.layout})
    assert found is not None
    assert 1e38 < found < np.inf


def test_layouts_that_differ_say_where():
    ours, theirs = Layout((Tensor("w", (3,)),)), Layout((Tensor("w", (4,)),))
    group = Group(ours, np.zeros(3, np.float32))
    with pytest.raises(LayoutError, match=r"'w' \(3,\) instead of 'w' \(4,\)"):
        check({"g": group}, {"g": theirs})
    with pytest.raises(LayoutError, match="groups"):
        check({"g": group}, {"h": ours})
    with pytest.raises(LayoutError, match="the layout says float32"):
        Group(ours, np.zeros(3))
    with pytest.raises(LayoutError, match="not those of the layout"):
        ours.flatten({"v": np.zeros(3)})
    with pytest.raises(LayoutError, match=r"has shape \(4,\)"):
        ours.flatten({"w": np.zeros(4)})


IDENTITY = Identity.new()
ENVELOPE = seal(IDENTITY, Address("run-1", 2, 1, IDENTITY.node), "a" * 64, [BODY[:10], BODY[10:]])


def test_an_envelope_travels_as_a_header_and_verifies():
    back = Envelope.from_header(ENVELOPE.to_header())
    assert back == ENVELOPE
    back.verify()
    assert back.size == len(BODY)


@pytest.mark.parametrize(
    "change",
    [
        {"address": ENVELOPE.address._replace(round=3)},
        {"address": ENVELOPE.address._replace(run="run-2")},
        {"address": ENVELOPE.address._replace(attempt=2)},
        {"address": ENVELOPE.address._replace(node=Identity.new().node)},
        {"plan": "b" * 64},
        {"digest": "b" * 64},
        {"size": 1},
        {"key": Identity.new().public},
        {"signature": bytes(64)},
    ],
)
def test_an_envelope_changed_anywhere_does_not_verify(change):
    with pytest.raises(WireError):
        ENVELOPE._replace(**change).verify()


@given(st.sampled_from(sorted(json.loads(ENVELOPE.to_header()))), st.none() | st.integers() | st.text() | st.lists(st.integers()))
def test_no_envelope_makes_the_parser_fail_in_another_way(field, value):
    fields = json.loads(ENVELOPE.to_header()) | {field: value}
    try:
        Envelope.from_header(json.dumps(fields)).verify()
    except WireError as error:
        assert "\n" not in str(error)  # noqa: PT017


DEEP = b"[" * 4000
"""Too deep for Python's JSON reader, which says so by another error than for what is no JSON."""


def test_json_nested_deeper_than_python_reads_is_refused_like_any_other():
    with pytest.raises(WireError, match="no envelope"):
        Envelope.from_header(DEEP)
    with pytest.raises(WireError, match="no JSON"):
        decode(len(DEEP).to_bytes(8, "little") + DEEP, {}, MODEL)
    metadata = {"atoll": "1", "model": MODEL, "weight": "0x1p+0", "metrics": DEEP.decode()}
    with pytest.raises(WireError, match="damaged"):
        decode(b"".join(pack(one_group(), metadata)), layouts_of(one_group()), MODEL)
    with pytest.raises(PlanError, match="no JSON"):
        Plan.from_json(DEEP)


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "deep" / "node.key"
    first, again = Identity.at(path), Identity.at(path)
    assert first.node == again.node == node_of(first.public)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signed_by(first.public, again.sign(b"hello"), b"hello")
    assert not signed_by(first.public, again.sign(b"hello"), b"hullo")
    assert not signed_by(b"short", b"", b"")
    path.write_bytes(b"damaged")
    with pytest.raises(AtollError, match="holds no Ed25519 key of 32 bytes"):
        Identity.at(path)
