"""Encrypted sums as a link: its phases by name, its messages as bytes, its updates as ciphertexts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.privacy.encryption import node, server
from atoll.privacy.encryption.update import Code
from atoll.privacy.link import Letters, Link, Own, Undone, reached
from atoll.privacy.secagg import server as gathering
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Groups, Layouts, Total, Update

BEFORE, AFTER = ("keys", "secrets"), ("survivors", "open")


class _Node(NamedTuple):
    """A node's state: who it is, and how far it got."""

    identity: Identity
    at: Any


class _Shown(NamedTuple):
    """A node that was shown the sum it is to open."""

    confirmed: node.Confirmed
    sums: Groups


def encryption(layouts: Layouts, metrics: tuple[str, ...], clip: float, weight: float) -> Link:
    """Return encrypted sums for updates of some layouts.

    Args:
        layouts: of an update's groups; parameters must be among them.
        metrics: the names of all metrics that a node may have.
        clip: the largest magnitude of a parameter's change; an update with a larger one is refused.
        weight: the largest weight of a node.

    Raises:
        PlanError: there is nothing to encrypt.
    """

    def code(nodes: int) -> Code:
        return Code(layouts, metrics, clip, weight, nodes)

    def updates(_: Layouts) -> Layouts:
        return code(1).protected

    def answer(own: _Node, phase: str, message: bytes) -> tuple[_Node, bytes]:
        at: object
        match phase:
            case "keys":
                at, letter = node.advertise(reached(own.at, Terms, phase), own.identity)
            case "secrets":
                at, letter = node.give(reached(own.at, node.Advertised, phase), message)
            case "survivors":
                at, letter = node.confirm(reached(own.at, node.Encrypted, phase), message, own.identity)
            case "open":
                shown = reached(own.at, _Shown, phase)
                how = code(len(shown.confirmed.encrypted.cohort.records))
                at, letter = None, node.reveal(shown.confirmed, message, shown.sums, how)
            case _:
                raise PrivacyError(f"encryption has no phase '{phase}'")
        return own._replace(at=at), letter

    def protect(own: _Node, message: bytes, update: Update) -> tuple[_Node, Update]:
        given = reached(own.at, node.Given, "encrypting")
        encrypted, sent = node.protect(given, message, update, code(len(given.cohort.records)))
        return own._replace(at=encrypted), sent

    def undo(own: Own, answers: Letters, total: Total) -> Undone:
        relayed = reached(own, gathering.Relayed, "opening")
        how = code(len(relayed.cohort.records))
        opened, faults = server.compare(gathering.members(relayed.cohort, answers), how, len(relayed.survivors))
        return Undone(*how.decode(total, opened), {**relayed.faults, **faults})

    code(1)
    sides = updates, _join, answer, protect, _begin, _collect, _close, undo
    return Link(BEFORE, AFTER, *sides, opens="open", few=server.OPENERS, see=_see, whose=_whose)


def _whose(own: _Node) -> tuple[str, ...]:
    if not isinstance(own.at, node.Confirmed):
        return ()
    return tuple(own.at.encrypted.cohort.records[place].node for place in sorted(own.at.survivors))


def _join(terms: Terms, identity: Identity) -> _Node:
    return _Node(identity, _own(terms))


def _begin(terms: Terms) -> Own:
    return _own(terms)


def _own(terms: Terms) -> Terms:
    """Return terms under which nothing is signed that a secure sum of the same round could use."""
    return replace(terms, plan=hashlib.sha256(b"atoll ckks v1 " + terms.plan.encode()).hexdigest())


def _collect(own: Own, phase: str, answers: Letters) -> tuple[Own, Letters]:
    match phase:
        case "keys":
            gathered, cohort = gathering.gather(reached(own, Terms, phase), answers)
            return gathered, dict.fromkeys(gathered.cohort.places, cohort)
        case "secrets":
            return server.relay(reached(own, gathering.Gathered, phase), answers)
        case "survivors":
            proven, proof = gathering.prove(reached(own, gathering.Relayed, phase), answers)
            return proven, dict.fromkeys(server.openers(proven), proof)
    raise PrivacyError(f"encryption collects nothing in a phase '{phase}'")


def _close(own: Own, nodes: Collection[str]) -> tuple[Own, Letters]:
    closed, survivors = gathering.close(reached(own, gathering.Relayed, "closing"), nodes)
    return closed, dict.fromkeys(nodes, survivors)


def _see(own: _Node, sums: Groups) -> _Node:
    return own._replace(at=_Shown(reached(own.at, node.Confirmed, "the sum"), sums))
