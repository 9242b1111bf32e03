"""A node's part in a link: of one try at a time, in memory only, and one sum a round by its ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.federation import plan

from atoll import learners
from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.messages import UPDATE, StartTraining
from atoll.node.linked import Linked
from atoll.plan import Plan
from atoll.privacy.choose import protected, terms
from atoll.store.ledger import Gift, Ledger
from atoll.vector import Group, Update

AGREED, ENCRYPTED = (plan(privacy={guard: True}) for guard in ("secure_aggregation", "encryption"))


def task(round_: int, attempt: int) -> StartTraining:
    return StartTraining(run="run", round=round_, attempt=attempt, model="0" * 64, deadline=60)


def started(place: Path, identity: Identity, agreed: Plan = AGREED) -> tuple[Linked, Ledger]:
    ledger, (found, layouts) = Ledger(place), protected(agreed, *(learners.build(agreed).layouts,) * 2)
    assert found
    return Linked(found, agreed, identity, ledger, layouts), ledger


def ones() -> Update:
    layouts = learners.build(AGREED).layouts
    return Update({name: Group(layout, np.ones(layout.size, layout.dtype)) for name, layout in layouts.items()}, 1.0)


TURNS = {  # phase: the plan, what was answered before, and what is done out of turn
    "shares": (AGREED, (), lambda node: node.answer(task(1, 1), "shares", b"")),
    "update": (AGREED, ("keys",), lambda node: node.protect(task(1, 1), b"", NOTHING)),
    "survivors": (AGREED, ("keys",), lambda node: node.answer(task(1, 1), "survivors", b"")),
    "unmask": (AGREED, ("keys",), lambda node: node.answer(task(1, 1), "unmask", b"")),
    "secrets": (ENCRYPTED, (), lambda node: node.answer(task(1, 1), "secrets", b"")),
    "encrypted": (ENCRYPTED, ("keys",), lambda node: node.protect(task(1, 1), b"", NOTHING)),
    "signed": (ENCRYPTED, ("keys",), lambda node: node.answer(task(1, 1), "survivors", b"")),
    "open": (ENCRYPTED, ("keys",), lambda node: node.answer(task(1, 1), "open", b"", {})),
}
NOTHING = Update({}, 1.0)


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


@pytest.mark.parametrize("agreed", [AGREED, ENCRYPTED], ids=["masks", "encrypted"])
def test_a_try_is_of_the_model_that_it_was_first_asked_with(tmp_path, agreed):
    """What is asked again after a refusal can be another model: its update would stand alone among the others' of the first."""
    tried, others = Round(tmp_path, agreed), [Identity.new() for _ in range(4)]
    first, other = task(1, 1), task(1, 1).model_copy(update={"model": "1" * 64})
    keys = tried.node.answer(first, "keys", b"")
    assert tried.node.answer(first, "keys", b"") == keys
    with pytest.raises(PrivacyError, match="another model than before"):
        tried.node.answer(other, "keys", b"")
    with pytest.raises(PrivacyError, match="another model than before"):
        tried.reveals(1, others, trained=other)
    tried.ledger.close()


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
    one = Gift("run", 2, 1, "plan", "model", "everybody", "numbers")
    ledger.gives(one, 0.0)
    ledger.gives(one, 1.0)  # the very same again is no other sum
    ledger.close()
    second, ledger = started(tmp_path, me)
    ledger.gives(one._replace(attempt=2), 2.0)  # nor is another try over the same nodes: it is of the same numbers
    for other in (one._replace(attempt=3, cohort="all but one"), one._replace(cohort="all but one")):
        for _ in range(2):
            with pytest.raises(PrivacyError, match="a sum of round 2 over other nodes was revealed"):
                ledger.gives(other, 2.0)
    with pytest.raises(PrivacyError, match="this node's update isn't the one of the sum of round 2 that it helped to reveal"):
        ledger.gives(one._replace(attempt=3, numbers="others"), 2.0)
    assert first.answer(task(2, 3), "keys", b"")
    assert second.answer(task(3, 1), "keys", b""), "the next round is another sum"
    ledger.close()


def test_two_sums_over_the_same_numbers_are_of_the_same_nodes(tmp_path):
    """Training is the same from the same model, whatever the run is called: the sums' difference would be one node's update."""
    one, ledger = Gift("run", 1, 1, "plan", "model", "everybody", "numbers"), Ledger(tmp_path)
    ledger.gives(one, 0.0)
    ledger.gives(one._replace(run="once more", numbers="of more rows"), 1.0)
    for other in (one._replace(run="another", cohort="all but one"), one._replace(round=2, cohort="all but one")):
        for _ in range(2):  # what was refused isn't remembered as given
            with pytest.raises(PrivacyError, match="from this very model"):
                ledger.gives(other, 2.0)
    ledger.gives(one._replace(round=2, model="the next", cohort="all but one"), 3.0)
    ledger.close()


class Round:
    """Rounds over one real node of a plan, and the link's own halves for the others and the server."""

    def __init__(self, place: Path, agreed: Plan):
        self.agreed, self.me = agreed, Identity.new()
        self.node, self.ledger = started(place, self.me, agreed)
        found, _ = protected(agreed, *(learners.build(agreed).layouts,) * 2)
        assert found
        self.link = found

    def reveals(self, attempt: int, others: list[Identity], trained: StartTraining | None = None) -> bytes:
        """Go through a try of round 1 up to what the node gives to reveal its sum; `trained` is what it trained for, if else."""
        me, link, of, asked = self.me.node, self.link, terms(self.agreed, "run", 1, attempt, "0" * 64), task(1, attempt)
        own = {one.node: link.join(of, one) for one in others}
        server, said = link.begin(of), dict.fromkeys((me, *own), b"")
        for phase in (*link.before, UPDATE, *link.after):
            if phase == UPDATE:
                self.node.protect(trained or asked, said[me], ones())
                own = {one: link.protect(own[one], said[one], ones())[0] for one in own}
                server, said = link.close(server, list(said))
                continue
            answers = {me: self.node.answer(asked, phase, said[me])}
            for one in own:
                own[one], answers[one] = link.answer(own[one], phase, said[one])
            if phase != link.gives:
                server, said = link.collect(server, phase, answers)
        return answers[me]


@pytest.mark.parametrize("noised", [False, True])
def test_a_sum_that_was_not_opened_is_made_again_over_the_same_nodes_or_under_noise(tmp_path, noised):
    """Under noise of the nodes' own each sum is a release like any other, and each update is charged when it leaves."""
    noise = {"clip": 1.0, "distributed_noise": {"multiplier": 1.0, "delta": 1e-5}} if noised else {}
    tried = Round(tmp_path, plan(privacy={"secure_aggregation": True, **noise}))
    others = [Identity.new() for _ in range(4)]
    assert tried.reveals(1, others)
    assert tried.reveals(2, others)
    if noised:
        assert tried.reveals(3, others[1:])
    else:
        with pytest.raises(PrivacyError, match="a sum of round 1 over other nodes was revealed"):
            tried.reveals(3, others[1:])
        assert tried.reveals(4, others)
    tried.ledger.close()
