"""Who is asked in a round: drawn by lot from the nodes that are idle, each for itself in secret, or each in its turn. Pure."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable

from atoll.server.state import State


def draw(state: State) -> Iterable[str]:
    """Draw who is asked, so that the plan's part of the present nodes is at work; nobody where the buffer is full already."""
    if state.sealed:
        return state.sealed
    if state.rules.buffer and len(state.answers) >= state.rules.buffer:
        return ()
    welcome = state.conduct.welcome(state.present, state.round)
    if state.rules.cycle:
        return [_next(state, welcome)]
    idle = welcome - state.tasks.keys()
    if state.rules.draw == "poisson":
        return _each(state, idle)
    if state.rules.turns:
        return _whose_turn(state, idle, state.rules.turns)
    wanted = max(state.rules.minimum, math.ceil(state.rules.fraction * len(welcome)))
    asked = max(0, wanted - len(welcome - idle))
    return heapq.nsmallest(asked, idle, key=_lots(state))


def _each(state: State, nodes: Iterable[str]) -> list[str]:
    """Ask each node with the same chance, whoever else is asked; without the secret nobody foretells it or finds it out."""
    common = hashlib.sha256(state.secret + f" {state.round} {state.attempt} ".encode())
    below = math.floor(state.rules.fraction * (1 << 256))

    def asked(node: str) -> bool:
        own = common.copy()
        own.update(node.encode())
        return int.from_bytes(own.digest(), "big") < below

    return [node for node in nodes if asked(node)]


def _whose_turn(state: State, nodes: Iterable[str], turns: int) -> list[str]:
    """Ask those whose one round in so many it is, by a lot that every so many rounds draws anew."""
    epoch, turn = divmod(state.round - 1, turns)
    common = hashlib.sha256(f"{state.seed} turns {epoch} ".encode())

    def mine(node: str) -> bool:
        own = common.copy()
        own.update(f"{state.names[node]} {node}".encode())
        return int.from_bytes(own.digest(), "big") % turns == turn

    return [node for node in nodes if mine(node)]


def _lots(state: State) -> Callable[[str], bytes]:
    """Return what gives a node its lot in the draw of a cohort: as good as random, and the same on every replay."""
    # What all lots have in common is hashed once: nodes may be a million.
    common = hashlib.sha256(f"{state.seed} {state.round} {state.attempt} ".encode())

    def lot(node: str) -> bytes:
        own = common.copy()
        own.update(f"{state.names[node]} {node}".encode())
        return own.digest()

    return lot


def _next(state: State, welcome: Iterable[str]) -> str:
    """Whose turn it is: everybody's once in a cycle, in an order that each cycle draws anew; who fails is passed over."""
    names = {state.names[node]: node for node in welcome}
    cycle, turn = divmod(state.round - 1, len(names))
    order = sorted(names, key=lambda name: hashlib.sha256(f"{state.seed} cycle {cycle} {name}".encode()).digest())
    return names[order[(turn + state.attempt - 1) % len(order)]]


def by_name(state: State, nodes: Iterable[str]) -> tuple[str, ...]:
    """Return nodes in the order of their names, which is that of the fold."""
    return tuple(sorted(nodes, key=lambda node: (state.names[node], node)))
