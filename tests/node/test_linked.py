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
from atoll.plan import Plan
from atoll.privacy.choose import protected, terms
from atoll.store.ledger import Gift, Ledger
from atoll.vector import Update

AGREED, ENCRYPTED = (plan(privacy={guard: True}) for guard in ("secure_aggregation", "encryption"))


def task(round_: int, attempt: int) -> StartTraining:
    return StartTraining(run="run", round=round_, attempt=attempt, model="0" * 64, deadline=60)


def started(place: Path, identity: Identity, agreed: Plan = AGREED) -> tuple[Linked, Ledger]:
    ledger, (found, layouts) = Ledger(place), protected(agreed, *(learners.build(agreed).layouts,) * 2)
    assert found
    return Linked(found, agreed, identity, ledger, layouts), ledger


TURNS = {  # phase: the plan, what was answered before, and what is done out of turn
    "shares": (AGREED, (), lambda node: node.answer(task(1, 1), "shares", b"")),
    "update": (AGREED, ("keys",), lambda node: node.protect(task(1, 1), b"", UPDATE)),
    "survivors": (AGREED, ("keys",), lambda node: node.answer(task(1, 1), "survivors", b"")),
    "unmask": (AGREED, ("keys",), lambda node: node.answer(task(1, 1), "unmask", b"")),
    "secrets": (ENCRYPTED, (), lambda node: node.answer(task(1, 1), "secrets", b"")),
    "encrypted": (ENCRYPTED, ("keys",), lambda node: node.protect(task(1, 1), b"", UPDATE)),
    "signed": (ENCRYPTED, ("keys",), lambda node: node.answer(task(1, 1), "survivors", b"")),
    "open": (ENCRYPTED, ("keys",), lambda node: node.answer(task(1, 1), "open", b"", {})),
}
UPDATE = Update({}, 1.0)


@pytest.mark.parametrize("phase", TURNS)
def test_nothing_is_answered_out_of_turn(tmp_path, phase):
    agreed, before, act = TURNS[phase]
    node, ledger = started(tmp_path, Identity.new(), agreed)
    for earlier in before:
        node.answer(task(1, 1), earlier, b"")
    with pytest.raises(PrivacyError, match=r"out of turn|asked for something else"):
        act(node)
    ledger.close()


@pytest.mark.parametrize("agreed", [AGREED, ENCRYPTED], ids=["masks", "encrypted"])
def test_what_was_said_in_a_phase_is_not_said_again_otherwise(tmp_path, agreed):
    me, others = Identity.new(), [Identity.new() for _ in range(4)]
    node, ledger = started(tmp_path, me, agreed)
    link, _ = protected(agreed, *(learners.build(agreed).layouts,) * 2)
    assert link
    of, asked = terms(agreed, "run", 1, 1, "0" * 64), task(1, 1)
    keys = {one.node: link.answer(link.join(of, one), "keys", b"")[1] for one in others}
    keys[me.node] = node.answer(asked, "keys", b"")
    _, cohort = link.collect(link.begin(of), "keys", keys)
    answer = node.answer(asked, link.before[1], cohort[me.node])
    _, fewer = link.collect(link.begin(of), "keys", {one: said for one, said in keys.items() if one != others[0].node})
    assert me.node in fewer
    for _ in range(2):
        with pytest.raises(PrivacyError, match="something else than before"):
            node.answer(asked, link.before[1], fewer[me.node])
        assert node.answer(asked, link.before[1], cohort[me.node]) == answer
    ledger.close()


def test_a_try_is_of_the_model_that_it_was_first_asked_with(tmp_path):
    node, ledger = started(tmp_path, Identity.new())
    keys = node.answer(task(1, 1), "keys", b"")
    assert node.answer(task(1, 1).model_copy(update={"model": "1" * 64}), "keys", b"") == keys
    ledger.close()


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
