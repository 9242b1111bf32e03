"""Secure aggregation as a link passes the suite of links, over the wire's own bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.privacy.secagg.link import secagg
from atoll.privacy.secagg.terms import Terms
from atoll.testing import check_link
from atoll.testing.links import LAYOUTS


@pytest.mark.parametrize("bits", [32, 64])
def test_it_is_a_link(bits):
    check_link(lambda layouts: secagg(layouts, ("samples", "loss"), 1.0, 100, bits), tolerance=1e-5)


def test_the_suite_finds_a_link_that_gives_another_total():
    def make(layouts):
        link = secagg(layouts, ("samples", "loss"), 1.0, 100, 64)

        def undo(own, answers, total):
            undone = link.undo(own, answers, total)
            return undone._replace(total=replace(undone.total, weight=undone.total.weight + 1))

        return link._replace(undo=undo)

    with pytest.raises(AssertionError, match="the weights' sum"):
        check_link(make)


def test_the_suite_finds_a_link_that_takes_messages_out_of_turn():
    def make(layouts):
        link = secagg(layouts, ("samples", "loss"), 1.0, 100, 64)
        return link._replace(close=lambda own, nodes: link.close(own, nodes) if nodes else (own, {}))

    with pytest.raises(AssertionError, match="close was taken out of turn"):
        check_link(make)


def test_a_cohort_too_large_for_the_bits_is_given_up_by_name_before_anybody_masks():
    few = {"parameters": LAYOUTS["parameters"]}
    terms = Terms("run", 1, 1, "0" * 64, 3, 0.2, 0)
    narrow = secagg(few, (), 1.0, 1.0, 16)
    said = {one.node: narrow.answer(narrow.join(terms, one), "keys", b"")[1] for one in (Identity.new() for _ in range(128))}
    with pytest.raises(PrivacyError, match="in a sum of 128 nodes, 16 bits leave less than 8 to each; take bits = 32"):
        narrow.collect(narrow.begin(terms), "keys", said)
    narrow.collect(narrow.begin(terms), "keys", dict(list(said.items())[1:]))
