"""A node's part in a link: of one try at a time, in memory only, and one sum a round by its ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.federation import plan

from atoll import learners
from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.messages import StartTraining
from atoll.node.linked import Linked
from atoll.privacy.choose import protected
from atoll.store.ledger import Gift, Ledger

AGREED = plan(privacy={"secure_aggregation": True})


def task(round_: int, attempt: int) -> StartTraining:
    return StartTraining(run="run", round=round_, attempt=attempt, model="0" * 64, deadline=60)


def started(place: Path, identity: Identity) -> tuple[Linked, Ledger]:
    ledger, (found, layouts) = Ledger(place), protected(AGREED, *(learners.build(AGREED).layouts,) * 2)
    assert found
    return Linked(found, AGREED, identity, ledger, layouts), ledger


def test_a_node_that_was_started_again_has_no_part_in_the_try(tmp_path):
    me = Identity.new()
    first, ledger = started(tmp_path, me)
    keys = first.answer(task(1, 1), "keys", b"")
    assert first.answer(task(1, 1), "keys", b"") == keys, "said again it is another answer"
    ledger.close()
    second, ledger = started(tmp_path, me)
    with pytest.raises(PrivacyError, match="started again"):
        second.answer(task(1, 1), "shares", b"")
    ledger.close()


def test_a_node_helps_to_reveal_one_sum_a_round_whatever_dies(tmp_path):
    me = Identity.new()
    first, ledger = started(tmp_path, me)
    one = Gift("run", 2, 1, "plan", "model", "everybody")
    ledger.gives(one, 0.0)
    ledger.gives(one, 1.0)  # the very same again is no other sum
    with pytest.raises(PrivacyError, match="attempt 1"):
        first.answer(task(2, 2), "keys", b"")
    ledger.close()
    second, ledger = started(tmp_path, me)
    with pytest.raises(PrivacyError, match="attempt 1"):
        second.answer(task(2, 3), "keys", b"")
    for other in (one._replace(attempt=2), one._replace(cohort="all but one")):
        with pytest.raises(PrivacyError, match="another sum of round 2"):
            ledger.gives(other, 2.0)
    assert second.answer(task(3, 1), "keys", b""), "the next round is another sum"
    ledger.close()


def test_two_sums_over_the_same_numbers_are_of_the_same_nodes(tmp_path):
    """Training is the same from the same model, whatever the run is called: the sums' difference would be one node's update."""
    one, ledger = Gift("run", 1, 1, "plan", "model", "everybody"), Ledger(tmp_path)
    ledger.gives(one, 0.0)
    ledger.gives(one._replace(run="once more"), 1.0)
    for other in (one._replace(run="another", cohort="all but one"), one._replace(round=2, cohort="all but one")):
        for _ in range(2):  # what was refused isn't remembered as given
            with pytest.raises(PrivacyError, match="from this very model"):
                ledger.gives(other, 2.0)
    ledger.gives(one._replace(round=2, model="the next", cohort="all but one"), 3.0)
    ledger.close()
