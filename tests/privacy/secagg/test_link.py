"""Secure aggregation as a link passes the suite of links, over the wire's own bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atoll.privacy.secagg.link import secagg
from atoll.testing import check_link


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
