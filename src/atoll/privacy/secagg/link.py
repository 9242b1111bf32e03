"""Secure aggregation as a link: its phases by name, its messages as bytes, its updates as words under masks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from atoll.errors import PlanError, PrivacyError
from atoll.keys import Identity
from atoll.privacy.fixed import Bits
from atoll.privacy.link import Letters, Link, Own, Undone, reached
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.terms import Terms
from atoll.privacy.secagg.update import Code, parts_of
from atoll.vector import Layouts, Total, Update

BEFORE, AFTER = ("keys", "shares"), ("survivors", "unmask")


class _Node(NamedTuple):
    """A node's state: who it is, and how far it got."""

    identity: Identity
    at: Any


def secagg(layouts: Layouts, metrics: tuple[str, ...], clip: float, weight: float, bits: Bits) -> Link:
    """Return secure aggregation for updates of some layouts.

    Args:
        layouts: of an update's groups.
        metrics: the names of all metrics that a node may have.
        clip: the largest magnitude of a parameter's change; beyond it, it is cut.
        weight: the largest weight of a node.
        bits: of a masked parameter, 16, 32 or 64.
    """

    def code(nodes: int) -> Code:
        return Code(layouts, metrics, clip, weight, nodes, bits)

    def updates(_: Layouts) -> Layouts:
        return code(1).masked

    def protect(own: _Node, message: bytes, update: Update) -> tuple[_Node, Update]:
        shared = reached(own.at, node.Shared, "masking")
        words = code(len(shared.cohort.records)).encode(update)
        return own._replace(at=node.mask(shared, message, parts_of(words.groups))), words

    def collect(own: Own, phase: str, answers: Letters) -> tuple[Own, Letters]:
        after, letters = _collect(own, phase, answers)
        if isinstance(after, server.Gathered):  # before anybody masks: so many numbers must fit into the bits
            try:
                _ = code(len(after.cohort.records)).masked
            except PlanError as error:
                raise PrivacyError(str(error)) from error
        return after, letters

    def undo(own: Own, answers: Letters, total: Total) -> Undone:
        relayed = reached(own, server.Relayed, "unmasking")
        faults = server.unmask(relayed, answers, parts_of(total.groups))
        return Undone(*code(len(relayed.cohort.records)).decode(total), {**relayed.faults, **faults})

    return Link(BEFORE, AFTER, updates, _join, _answer, protect, _begin, collect, _close, undo, whose=_whose)


def _whose(own: _Node) -> tuple[str, ...]:
    if not isinstance(own.at, node.Confirmed):
        return ()
    return tuple(own.at.masked.cohort.records[place].node for place in sorted(own.at.survivors))


def _join(terms: Terms, identity: Identity) -> _Node:
    return _Node(identity, terms)


def _answer(own: _Node, phase: str, message: bytes) -> tuple[_Node, bytes]:
    at: object
    match phase:
        case "keys":
            at, letter = node.advertise(reached(own.at, Terms, phase), own.identity)
        case "shares":
            at, letter = node.share(reached(own.at, node.Advertised, phase), message)
        case "survivors":
            at, letter = node.confirm(reached(own.at, node.Masked, phase), message, own.identity)
        case "unmask":
            at, letter = None, node.unmask(reached(own.at, node.Confirmed, phase), message)
        case _:
            raise PrivacyError(f"secure aggregation has no phase '{phase}'")
    return own._replace(at=at), letter


def _begin(terms: Terms) -> Own:
    return terms


def _collect(own: Own, phase: str, answers: Letters) -> tuple[Own, Letters]:
    match phase:
        case "keys":
            gathered, cohort = server.gather(reached(own, Terms, phase), answers)
            return gathered, dict.fromkeys(gathered.cohort.places, cohort)
        case "shares":
            return server.relay(reached(own, server.Gathered, phase), answers)
        case "survivors":
            proven, proof = server.prove(reached(own, server.Relayed, phase), answers)
            return proven, {proven.cohort.records[place].node: proof for place in proven.signatures}
    raise PrivacyError(f"secure aggregation collects nothing in a phase '{phase}'")


def _close(own: Own, nodes: Collection[str]) -> tuple[Own, Letters]:
    closed, survivors = server.close(reached(own, server.Relayed, "closing"), nodes)
    return closed, dict.fromkeys(nodes, survivors)
