"""A chain of signed entries: whatever is changed in it is found, unless its signer writes all of it anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.chain import Chain, Noted, attested, canonical, read
from atoll.errors import AuditError
from atoll.keys import Identity

PLAN = "a" * 64


def chained(facts: list[dict[str, object]], identity: Identity) -> list[Noted]:
    chain = Chain(identity, "run", PLAN)
    links = []
    for number, one in enumerate(facts):
        chain.last = chain.next({"key": chain.key, **one} if not number else one)
        links.append(chain.last)
    return links


IDENTITY = Identity.new()
LINKS = chained(
    [{"what": "begun"}, {"what": "admitted", "name": "α"}, {"what": "closed", "round": 1}, {"what": "ended"}], IDENTITY
)


def test_what_is_read_is_what_was_said():
    assert [one["what"] for one in read(LINKS, "run", PLAN)] == ["begun", "admitted", "closed", "ended"]
    assert canonical({"b": 1.5, "a": "α"}) == '{"a":"\\u03b1","b":1.5}'


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["entry", "head", "signature"]), st.data())
def test_any_changed_byte_is_found(place, column, data):
    before = getattr(LINKS[place], column).encode()
    at, byte = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 127))
    changed = (before[:at] + bytes([byte]) + before[at + 1 :]).decode()
    if changed == before.decode():
        return
    links = [*LINKS[:place], replace(LINKS[place], **{column: changed}), *LINKS[place + 1 :]]
    with pytest.raises(AuditError, match=f"entry {place + 1}"):
        read(links, "run", PLAN)


@given(st.permutations(range(4)))
def test_any_other_order_is_found(order):
    links = [LINKS[place] for place in order]
    renumbered = [replace(link, number=number) for number, link in enumerate(links, 1)]
    for wrong in (links, renumbered):
        if order != sorted(order):
            with pytest.raises(AuditError):
                read(wrong, "run", PLAN)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_entry_that_is_left_out_is_found(gone):
    with pytest.raises(AuditError, match=f"entry {gone + 1} is missing: number {gone + 2} stands in its place"):
        read([*LINKS[:gone], *LINKS[gone + 1 :]], "run", PLAN)


def test_another_runs_or_plans_record_is_found():
    for run, plan in (("another", PLAN), ("run", "b" * 64)):
        with pytest.raises(AuditError, match="entry 1 was altered"):
            read(LINKS, run, plan)


def test_an_entry_of_another_signer_is_found():
    chain = Chain(Identity.new(), "run", PLAN, LINKS[1])
    with pytest.raises(AuditError, match="entry 3: the signature isn't that of key"):
        read([*LINKS[:2], chain.next({"what": "closed", "round": 1})], "run", PLAN)


def test_records_that_are_none():
    with pytest.raises(AuditError, match="it has no record"):
        read([], "run", PLAN)
    for facts in ([1], "text", {"key": "no key"}):
        forged = Chain(IDENTITY, "run", PLAN).next(facts)  # type: ignore[arg-type]
        with pytest.raises(AuditError, match="entry 1"):
            read([forged], "run", PLAN)


def test_a_signature_has_one_spelling():
    assert attested(IDENTITY.public.hex(), IDENTITY.sign(b"m").hex(), b"m")
    assert not attested(IDENTITY.public.hex(), IDENTITY.sign(b"m").hex().upper(), b"m")
    assert json.loads(LINKS[0].entry)["key"] == IDENTITY.public.hex()
