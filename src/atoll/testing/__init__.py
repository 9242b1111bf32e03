"""Suites that every implementation of a boundary passes: run them over your own.

Enters: how to make one. Leaves: nothing, or an assertion that says what it breaks. May import everything;
imported by tests only.
"""

from atoll.testing.algorithms import check_algorithm
from atoll.testing.learners import check_learner
from atoll.testing.links import check_link
from atoll.testing.logs import check_log
from atoll.testing.stores import check_store

__all__ = ["check_algorithm", "check_learner", "check_link", "check_log", "check_store"]
