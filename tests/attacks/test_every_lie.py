"""Phase by kind of lie, for both secure sums: each that a server can tell is in a test, or harms nobody, and here stands which.

A server says something to a node in each phase. It can leave something out, put something in, exchange it, alter it, play an
old one again, say something twice, or too little; tell each half of the nodes something else; say it out of turn; or again, and
otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

import pytest

KINDS = (
    *("leaves out", "puts in", "exchanges", "alters", "plays again", "says twice", "too few", "cut or nothing"),
    *("to each half another", "out of turn", "otherwise again"),
)
MASKS, ENCRYPTED, NODE = "attacks.test_lies_of_a_server", "attacks.test_lies_about_encrypted_sums", "node.test_linked"
TURN = f"{NODE}::test_nothing_is_answered_out_of_turn"
AGAIN = f"{NODE}::test_what_was_said_in_a_phase_is_not_said_again_otherwise"

Cell = tuple[str, ...] | str
"""The tests, `module::function` or `module::function[case]`; or why the lie harms nobody."""


def of(module: str, function: str, *cases: str) -> tuple[str, ...]:
    return tuple(f"{module}::{function}[{case}]" for case in cases) or (f"{module}::{function}",)


def table(module: str, function: str, **cells: Cell) -> Mapping[str, Cell]:
    """A phase: case names stand for those of one test; what has `::` in it is another test, and a lone text a reason."""

    def cell(said: Cell) -> Cell:
        if isinstance(said, str):
            return said
        return tuple(one if "::" in one else f"{module}::{function}[{one}]" for one in said)

    return {name.replace("_", " "): cell(said) for name, said in cells.items()}


LIES: Mapping[str, Mapping[str, Cell]] = {
    "masks: the cohort": table(
        MASKS,
        "test_a_lie_about_the_cohort",
        leaves_out=("a cohort without me",),
        puts_in=("a node in two roles", f"{MASKS}::test_a_node_of_the_servers_own_beside_the_roster"),
        exchanges=("a key that isn't the node's", "a seed's hash that isn't the node's", "a node with another's keys"),
        alters=("a cohort in another order", f"{MASKS}::test_a_weak_key_of_a_friend_is_found_by_the_server_and_by_the_node"),
        plays_again=(
            *("keys of an earlier round", "keys of an earlier try", "keys for another plan", "my keys of a life before"),
            *("keys for a smaller minimum", "keys for other fractions", "keys of a node that was sent another model"),
        ),
        says_twice=("a node in two roles",),
        too_few=("a cohort below the minimum",),
        cut_or_nothing=("half a record", "nothing"),
        to_each_half_another=(f"{MASKS}::test_other_cohorts_shown_to_each_half",),
        out_of_turn=(f"{TURN}[shares]",),
        otherwise_again=(AGAIN,),
    ),
    "masks: who gave shares, and mine": table(
        MASKS,
        "test_a_lie_about_who_gave_shares",
        leaves_out=("I gave none",),
        puts_in=("one who is no giver", "a share of my own", "a node beyond the cohort"),
        exchanges=(
            *of(MASKS, "test_a_share_that_is_not_the_givers_for_me_is_never_given", "of_another_giver", "for_another_holder"),
            *of(MASKS, "test_a_share_that_is_not_the_givers_for_me_is_never_given", "my_own_sent_back"),
        ),
        alters=of(MASKS, "test_a_share_that_is_not_the_givers_for_me_is_never_given", "altered"),
        plays_again=of(MASKS, "test_a_share_that_is_not_the_givers_for_me_is_never_given", "of_an_earlier_round"),
        says_twice=("a share twice",),
        too_few=("too few gave some",),
        cut_or_nothing=("half a share", "nothing"),
        to_each_half_another=(f"{MASKS}::test_other_givers_shown_to_each_half",),
        out_of_turn=(f"{TURN}[update]",),
        otherwise_again="what was trained is masked once: the node's machine takes one such word for a task",
    ),
    "masks: who survived": table(
        MASKS,
        "test_a_lie_about_the_survivors",
        leaves_out=("without me", f"{MASKS}::test_survivors_that_leave_a_node_alone_in_a_sparse_graph"),
        puts_in=(f"{MASKS}::test_a_survivor_who_gave_no_shares",),
        exchanges=(f"{MASKS}::test_never_both_kinds_of_share_for_one_node",),
        alters="a set is only right or wrong: each bit that is another leaves a node out or puts one in",
        plays_again="a set of nodes is bound to its sum by who signs it: see who signed",
        says_twice="a set names each node once",
        too_few=("below the minimum", "nobody"),
        cut_or_nothing=of(MASKS, "test_a_set_of_survivors_of_another_length", "nothing", "too long", "a node beyond the cohort"),
        to_each_half_another=(f"{MASKS}::test_other_survivors_shown_to_each_half_of_the_cohort",),
        out_of_turn=(f"{TURN}[survivors]",),
        otherwise_again=(AGAIN, f"{MASKS}::test_never_both_kinds_of_share_for_one_node"),
    ),
    "masks: who signed": table(
        MASKS,
        "test_a_lie_about_who_signed",
        leaves_out=("one signature fewer",),
        puts_in=(f"{MASKS}::test_a_signature_by_a_node_that_did_not_survive",),
        exchanges=("one node's for another's",),
        alters=("a forged one",),
        plays_again=("those of an earlier try",),
        says_twice=("one node's twice",),
        too_few=("one signature fewer",),
        cut_or_nothing=("none", "half of one"),
        to_each_half_another=(f"{MASKS}::test_other_survivors_shown_to_each_half_of_the_cohort",),
        out_of_turn=(f"{TURN}[unmask]",),
        otherwise_again=(AGAIN, f"{NODE}::test_a_node_helps_to_reveal_one_sum_a_round_whatever_dies"),
    ),
    "encrypted: the cohort": table(
        ENCRYPTED,
        "test_a_lie_about_the_cohort",
        leaves_out=("without me",),
        puts_in=("a node in two roles", f"{ENCRYPTED}::test_a_node_of_the_servers_own_beside_the_roster"),
        exchanges=("a key that isn't the node's",),
        alters=(f"{ENCRYPTED}::test_what_is_signed_for_masks_is_nothing_here_and_the_other_way_round",),
        plays_again=(
            *("keys of an earlier round", "keys of an earlier try", "keys for another plan", "keys for a smaller minimum"),
            *("my keys of a life before", "keys of a node that was sent another model"),
        ),
        says_twice=("a node in two roles",),
        too_few=("too few",),
        cut_or_nothing=("nothing", "half a record"),
        to_each_half_another=(f"{ENCRYPTED}::test_other_cohorts_shown_to_each_half_open_nothing",),
        out_of_turn=(f"{TURN}[secrets]",),
        otherwise_again=(AGAIN,),
    ),
    "encrypted: who gave secrets, and mine": table(
        ENCRYPTED,
        "test_a_lie_about_who_gave_what",
        leaves_out=("I gave none", "one who gave is left out"),
        puts_in=("one who gave nothing",),
        exchanges=("another node's secret", "a secret for another node"),
        alters=("an altered secret",),
        plays_again=("a secret of an earlier round",),
        says_twice=("a secret twice",),
        too_few=("too few gave",),
        cut_or_nothing=("nothing", "half a secret"),
        to_each_half_another=(f"{ENCRYPTED}::test_other_givers_shown_to_each_half_open_nothing",),
        out_of_turn=(f"{TURN}[encrypted]",),
        otherwise_again="what was trained is encrypted once: the node's machine takes one such word for a task",
    ),
    "encrypted: who survived": table(
        ENCRYPTED,
        "test_a_lie_about_the_survivors",
        leaves_out=("without me",),
        puts_in=(f"{ENCRYPTED}::test_a_survivor_who_gave_no_secret", "a node beyond the cohort"),
        exchanges=(f"{ENCRYPTED}::test_two_sums_of_one_round_are_never_opened",),
        alters="a set is only right or wrong: each bit that is another leaves a node out or puts one in",
        plays_again="a set of nodes is bound to its sum by who signs it: see who signed",
        says_twice="a set names each node once",
        too_few=("too few", "nobody"),
        cut_or_nothing=("cut",),
        to_each_half_another=(f"{ENCRYPTED}::test_two_sums_of_one_round_are_never_opened",),
        out_of_turn=(f"{TURN}[signed]",),
        otherwise_again=(AGAIN,),
    ),
    "encrypted: who signed": table(
        ENCRYPTED,
        "test_a_lie_about_who_signed",
        leaves_out=("one signature fewer",),
        puts_in=(f"{ENCRYPTED}::test_a_signature_by_a_node_that_did_not_survive",),
        exchanges=("one node's for another's",),
        alters=("a forged one",),
        plays_again=("those of another try",),
        says_twice=("one node's twice",),
        too_few=("one signature fewer",),
        cut_or_nothing=("none", "half of one"),
        to_each_half_another=(f"{ENCRYPTED}::test_two_sums_of_one_round_are_never_opened",),
        out_of_turn=(f"{TURN}[open]",),
        otherwise_again=(AGAIN, f"{NODE}::test_a_node_helps_to_reveal_one_sum_a_round_whatever_dies"),
    ),
    "encrypted: the sum": table(
        ENCRYPTED,
        "test_what_is_not_the_sum_of_the_survivors_is_never_opened",
        leaves_out=("the sum without one",),
        puts_in=("the sum and one more of one",),
        exchanges=(
            *("one node's ciphertext", "one node's ciphertext with the sum's tag", "one exchanged for another"),
            *("one node's ciphertext five times", "five times with the sum's tag", "one node's ciphertext, lifted"),
        ),
        alters=(
            "one word altered",
            "another tag",
            "the sum modulo the primes",
            "parts in another order",
            "one's first part in the sum",
        ),
        plays_again=(f"{ENCRYPTED}::test_a_sum_of_another_round_or_length_is_not_opened",),
        says_twice=("the sum times three",),
        too_few=("nothing but zeros",),
        cut_or_nothing=(f"{ENCRYPTED}::test_a_sum_of_another_round_or_length_is_not_opened",),
        to_each_half_another=(f"{ENCRYPTED}::test_two_sums_of_one_round_are_never_opened",),
        out_of_turn=(f"{TURN}[open]",),
        otherwise_again=(AGAIN,),
    ),
    "the task": table(
        NODE,
        "",
        leaves_out="who isn't asked gives nothing",
        puts_in=("node.test_policy::test_a_round_that_the_plan_has_not_is_refused_without_any_policy",),
        exchanges=("node.test_tasks::test_a_task_for_a_run_of_another_name_is_no_task",),
        alters=("faults.test_poisoned_models::test_a_node_refuses_a_poisoned_model_in_one_line_and_stays_usable",),
        plays_again=("node.test_machine::test_an_older_task_is_no_task",),
        says_twice=("node.test_tasks::test_the_update_of_a_try_is_made_once",),
        too_few="a cohort's size is checked where it is shown",
        cut_or_nothing="what is no message of the protocol is dropped: tests/test_fuzz.py",
        to_each_half_another=of(MASKS, "test_a_lie_about_the_cohort", "keys of a node that was sent another model"),
        out_of_turn=("node.test_policy::test_a_round_is_tried_so_often_at_most_without_any_policy",),
        otherwise_again=(
            *of(NODE, "test_two_sums_over_the_same_numbers_are_of_the_same_nodes"),
            *of(NODE, "test_a_try_is_of_the_model_that_it_was_first_asked_with"),
        ),
    ),
}


def named() -> Iterator[str]:
    for phase in LIES.values():
        for cell in phase.values():
            yield from cell if isinstance(cell, tuple) else ()


def cases(name: str) -> set[str]:
    """The cases of a test, by its parametrisation."""
    module, _, function = name.partition("[")[0].partition("::")
    test = getattr(importlib.import_module(f"tests.{module}"), function)
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return {
        str(said)
        for mark in marks
        for said in (mark.kwargs.get("ids") or [getattr(one, "__name__", one) for one in mark.args[1]])
    }


@pytest.mark.parametrize("phase", LIES)
def test_each_phase_has_each_kind_of_lie(phase):
    assert LIES[phase].keys() == set(KINDS)
    assert all(LIES[phase].values())


@pytest.mark.parametrize("name", sorted(set(named())))
def test_each_is_tested(name):
    _, _, case = name.partition("[")
    found = cases(name)
    assert not case or case.rstrip("]") in found, f"{name}: of {sorted(found)}"


@pytest.mark.parametrize("module", [MASKS, ENCRYPTED])
def test_each_case_has_its_place(module):
    listed = set(named())
    for function in {name.partition("[")[0] for name in listed if name.startswith(f"{module}::test_") and "[" in name}:
        missing = {f"{function}[{case}]" for case in cases(function)} - listed
        assert not missing, f"it has no place in the table: {sorted(missing)}"
