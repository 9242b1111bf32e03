"""Encrypted sums as a link pass the suite of links, over the wire's own bytes."""

from __future__ import annotations

from atoll.privacy.encryption.link import encryption
from atoll.testing import check_link


def test_it_is_a_link():
    check_link(lambda layouts: encryption(layouts, ("samples", "loss"), 1.0, 100), tolerance=1e-6)
