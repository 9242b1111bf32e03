"""What a run is doing, in plain values: what `GET /v1/status`, the page and `/metrics` all show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.server.state import Phase, State, waiting_for


def status(
    run: State,
    now: float,
    clock: float,
    lost: Mapping[str, float],
    arriving: Mapping[str, tuple[int, int]],
    silent: Mapping[str, float],
    *,
    log: str | None,
    store: str | None,
) -> dict[str, Any]:
    """Return a run's present state and what it waits for.

    Args:
        run: the state.
        now: the machine's time, in seconds.
        clock: the same moment in seconds since the epoch.
        lost: node → when its connection was lost, in seconds since the epoch.
        arriving: node → bytes that are here of the update it is sending, and bytes expected.
        silent: node → for how many seconds nothing was heard of it, where it should have answered a ping.
        log: why the log can't be read at present, or None.
        store: why the store can't be written at present, or None.
    """
    at_work = frozenset(run.cohort) | run.tasks.keys()
    waits = run.phase not in (Phase.CLOSING, Phase.ENDED)
    nodes = [
        {
            "node": node,
            "name": name,
            "connected": node in run.present,
            "asked": node in at_work,
            "answered": run.answered(node),
            **({"round": task.round} if (task := run.tasks.get(node)) else {}),
            **_doing(run, node, node in at_work, lost, arriving),
            **({"silent": round(silent[node], 1)} if node in silent else {}),
        }
        for node, name in sorted(run.names.items(), key=lambda item: item[1])
    ]
    return {
        "run": run.run,
        "phase": run.phase.value,
        "round": run.round,
        "attempt": run.attempt,
        "rounds": run.rounds,
        "waiting_for": "; ".join(filter(None, (waiting_for(run, now), log, store))),
        "until": clock + run.until - now if waits else None,
        "cohort": len(run.cohort),
        "accepted": len(run.accepted),
        "needed": run.needed,
        "outcome": run.outcome,
        "reason": run.reason,
        "log_waiting": log,
        "store_waiting": store,
        "nodes": nodes,
    }


def _doing(
    run: State, node: str, asked: bool, lost: Mapping[str, float], arriving: Mapping[str, tuple[int, int]]
) -> dict[str, str | float | int]:
    """One word for what a node does, and the facts that go with it."""
    if node not in run.present:
        since = {"since": lost[node]} if node in lost else {}
        return {"doing": "lost", "waited_for": asked and not run.answered(node), **since}
    if why := run.declines.get(node) or run.lost.get(node):
        return {"doing": "declined", "reason": why}
    if run.answered(node):
        return {"doing": "answered"}
    if not asked and run.conduct.held_out(node, run.round):
        return {"doing": "held_out", "reason": f"its updates were refused; until round {run.conduct.until[node]} is over"}
    if not asked:
        return {"doing": "idle"}
    if node in arriving:
        received, size = arriving[node]
        return {"doing": "sending", "waited_for": True, "received": received, "size": size}
    return {"doing": "training", "waited_for": True}
