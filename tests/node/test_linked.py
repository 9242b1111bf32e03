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
from atoll.store.ledger import Ledger

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
    ledger.gives("run", 2, 1, 0.0)
    ledger.gives("run", 2, 1, 1.0)  # the very same again is no other sum
    with pytest.raises(PrivacyError, match="attempt 1"):
        first.answer(task(2, 2), "keys", b"")
    ledger.close()
    second, ledger = started(tmp_path, me)
    with pytest.raises(PrivacyError, match="attempt 1"):
        second.answer(task(2, 3), "keys", b"")
    with pytest.raises(PrivacyError, match="attempt 1"):
        ledger.gives("run", 2, 2, 2.0)
    assert second.answer(task(3, 1), "keys", b""), "the next round is another sum"
    ledger.close()
