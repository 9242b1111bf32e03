"""The suite of links: what every guard of updates keeps, whatever happens to its messages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from atoll.algorithms.folds import mean
from atoll.errors import AtollError
from atoll.keys import Identity
from atoll.privacy.link import Link, Undone
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Flat, Group, Layout, Layouts, Tensor, Total, Update, add
from atoll.wire import decode, encode

LAYOUTS: Layouts = {
    "parameters": Layout((Tensor("kernel", (7, 3)), Tensor("bias", (3,)))),
    "buffers": Layout((Tensor("variance", (3,)),)),
    "counts": Layout((Tensor("seen", (1,)),), "int64", "plain"),
}
"""Layouts of the updates that the suite protects: parameters within ±1, weights up to 100, metrics `samples` and `loss`."""
_MODEL = "0" * 64


class _Bodies:
    def __init__(self, ids: Sequence[str], updates: Sequence[Update], layouts: Layouts) -> None:
        self.ids, self.layouts, self.reference, self._updates = ids, layouts, None, updates

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        return [update.groups[group].values[lo:hi] for update in self._updates]


def check_link(make: Callable[[Layouts], Link], *, nodes: int = 6, dropout: float = 0.34, tolerance: float = 1e-4) -> None:
    """Check that a link's total is the plain one, whoever drops out when, and that nothing is taken out of turn.

    Args:
        make: a link for the layouts of `LAYOUTS`.
        nodes: how many take part.
        dropout: the fraction that the link must bear to lose.
        tolerance: how far a mean may be from the plain one.

    Raises:
        AssertionError: saying what it doesn't keep.
    """
    link = make(LAYOUTS)
    for phase in (None, *link.before, "update", *link.after):
        _whole(link, nodes, dropout, phase, tolerance)
    _out_of_turn(link, nodes, dropout)


def _terms(dropout: float) -> Terms:
    return Terms("run", 1, 0, _MODEL, 3, dropout, 0)


def _updates(nodes: Collection[str]) -> dict[str, Update]:
    rng = np.random.default_rng(0)
    made = {}
    for place, node in enumerate(sorted(nodes)):
        groups = {
            "parameters": Group(LAYOUTS["parameters"], rng.uniform(-1, 1, 24).astype(np.float32)),
            "buffers": Group(LAYOUTS["buffers"], rng.gamma(2, 50, 3).astype(np.float32)),
            "counts": Group(LAYOUTS["counts"], np.array([place])),
        }
        made[node] = Update(groups, 10.0 + 7 * place, {"samples": 10.0 + place, "loss": 0.5 * place})
    return made


def _whole(link: Link, nodes: int, dropout: float, loses: str | None, tolerance: float) -> None:
    who = {one.node: one for one in (Identity.new() for _ in range(nodes))}
    lost, terms, updates = min(who), _terms(dropout), _updates(who)
    own: dict[str, Any] = {one: link.join(terms, identity) for one, identity in who.items()}
    server = link.begin(terms)

    def answers(phase: str, said: Mapping[str, bytes]) -> dict[str, bytes]:
        out = {}
        for one in said:
            if not (phase == loses and one == lost):
                if phase == link.opens:
                    own[one] = link.see(own[one], total.groups)
                own[one], out[one] = link.answer(own[one], phase, said[one])
        return out

    said: Mapping[str, bytes] = dict.fromkeys(who, b"")
    for phase in link.before:
        server, said = link.collect(server, phase, answers(phase, said))
    bodies = {}
    for one in said:
        if not (loses == "update" and one == lost):
            own[one], protected = link.protect(own[one], said[one], updates[one])
            bodies[one] = b"".join(encode(protected, _MODEL))
    layouts = link.updates(LAYOUTS)
    arrived = [decode(bodies[one], layouts, _MODEL) for one in sorted(bodies)]
    total = mean(_Bodies(sorted(bodies), arrived, layouts), [update.weight for update in arrived], nodes)
    server, said = link.close(server, sorted(bodies))
    for phase in link.after[:-1]:
        server, said = link.collect(server, phase, answers(phase, said))
    undone = link.undo(server, answers(link.after[-1], said), total)
    _same(
        undone, [updates[one] for one in sorted(bodies)], nodes, tolerance, f"{lost} lost in {loses}" if loses else "nobody lost"
    )


def _same(undone: Undone, updates: Sequence[Update], nodes: int, tolerance: float, when: str) -> None:
    plain = mean(_Bodies([""] * len(updates), updates, LAYOUTS), [update.weight for update in updates], nodes)
    total: Total = undone.total
    assert total.weight == plain.weight, f"{when}: the weights' sum is {total.weight}, not {plain.weight}"
    assert (total.participants, total.registered) == (plain.participants, plain.registered), f"{when}: other participants"
    for name in LAYOUTS:
        off = np.abs(total.mean(name) - plain.mean(name)).max()
        assert off <= (tolerance * 50 if name == "buffers" else tolerance), f"{when}: the mean of {name} is off by {off}"
    for name, value in add([update.metrics for update in updates]).items():
        assert abs(undone.metrics[name] - value) <= tolerance, f"{when}: metric {name} is {undone.metrics[name]}, not {value}"
    assert not undone.faults, f"{when}: honest nodes are called wrong: {undone.faults}"


def _out_of_turn(link: Link, nodes: int, dropout: float) -> None:
    terms = _terms(dropout)
    own, server = link.join(terms, Identity.new()), link.begin(terms)
    update = next(iter(_updates(["one"]).values()))
    acts: dict[str, Callable[[], object]] = {
        **{phase: lambda phase=phase: link.answer(own, phase, b"") for phase in (*link.before[1:], *link.after, "no such phase")},  # type: ignore[misc]
        **{f"collect {phase}": lambda phase=phase: link.collect(server, phase, {}) for phase in (*link.before, *link.after)},  # type: ignore[misc]
        "protect": lambda: link.protect(own, b"", update),
        "close": lambda: link.close(server, []),
        "undo": lambda: link.undo(server, {}, Total({}, 1.0, nodes, nodes)),
    }
    for name, act in acts.items():
        try:
            act()
        except AtollError:
            continue
        raise AssertionError(f"{name} was taken out of turn, or with nothing")
