"""What a page shows, as plain values in the page's order: from the present state, and from what is stored."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atoll.learner import summary
from atoll.metrics import ASIDE
from atoll.plan import Aggregation
from atoll.server.page.curve import chart
from atoll.server.page.past import PLACES, TENTH, UPDATES, WORST, Past
from atoll.store import SPREAD, RunRow
from atoll.store.sql import SqlStore

ROWS = 20
"""A table has at most this many rows a page."""
NODES = 60
"""So many nodes are listed, those first that need a person's eye; all are counted."""
CHARTS = 4
_REFUSED = 60
_ORDER = ("lost", "held_out", "declined", "sending", "training", "idle", "answered")
_HIDDEN = {
    "secure_aggregation": "the plan's secure aggregation hides single updates and figures",
    "encryption": "the plan's encryption hides single updates and figures",
}
_LABELS = {"holdout": "server's holdout", "nodes": "nodes' own rows"}


class Which(NamedTuple):
    """Which pages of the long tables are shown, from 1."""

    rounds: int = 1
    runs: int = 1


def view(
    store: SqlStore, row: RunRow, current: str, past: Past, which: Which, status: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the page of a run shows.

    Args:
        store: where runs are stored.
        row: the run that is shown.
        current: the run that this server runs now.
        past: what is stored of the run that is shown.
        which: the pages of its tables.
        status: the present state, where the run shown is the current one.
    """
    stored = () if status else store.nodes(past.run)
    nodes = status["nodes"] if status else [{"node": one.node, "name": one.name, "doing": ""} for one in stored]
    listed = sorted(nodes, key=lambda one: (_ORDER.index(one["doing"] or "idle"), one["name"]))[:NODES]
    return {
        "run": row,
        "planned": past.plan["plan"]["rounds"],
        "rule": past.plan.get("aggregation", {}).get("rule", Aggregation().rule),
        "status": status,
        "running": status is not None and status["outcome"] is None,
        "zone": time.strftime("%Z"),
        "past": past,
        "figure": figure,
        "nodes": listed,
        "last": _last(store, past, [one["node"] for one in listed]),
        "counts": _counts(nodes),
        "charts": _charts(past),
        "differences": _differences(store, past, {one["node"]: one["name"] for one in nodes}),
        "models": _models(store, past),
        "rounds": _rounds(store, past, {one["node"]: one["name"] for one in nodes}, which.rounds),
        "runs": _runs(store, current, which.runs),
        "which": which,
    }


def _counts(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    counted = Counter(one["doing"] for one in nodes)
    return [(doing, counted[doing]) for doing in _ORDER if counted[doing]] or [("", len(nodes))]


def _charts(past: Past) -> list[dict[str, Any]]:
    """Loss, accuracy or R², what the plan judges models by, and its metrics: as many as there is room for."""
    measured = {name for place in PLACES for name in past.newest.get(place, {})}
    names = dict.fromkeys(("loss", "accuracy", "r2", past.metric, *past.asked, *sorted(measured - ASIDE)))
    found = (chart(name, {_LABELS[place]: past.curve(place, name) for place in PLACES}) for name in names)
    return list(itertools.islice(filter(None, found), CHARTS))


def _differences(store: SqlStore, past: Past, names: Mapping[str, str]) -> dict[str, Any]:
    """How nodes differ: each figure's spread over them, and how their updates lie to each other; or why that isn't seen."""
    hidden = next((said for guard, said in _HIDDEN.items() if past.plan.get("privacy", {}).get(guard)), "")
    last = past.tally.last_round
    judged = store.evaluations(past.run, max(0, last - 1), (SPREAD,), last)
    apart = judged[-1].metrics if judged else {}
    order = [name for name in dict.fromkeys((past.main, "loss", *past.asked)) if name in apart]
    whole = store.evaluations(past.run, judged[-1].round, ("nodes",), judged[-1].round) if judged else []
    everywhere = summary(whole[0].metrics) if whole else {}
    shown = (
        chart(f"{past.main} of nodes", {place: past.curve(place, past.main) for place in (WORST, TENTH)}),
        chart("dissimilarity of updates", {UPDATES: past.curve(UPDATES, "dissimilarity")}),
    )
    return {
        "hidden": hidden,
        "noisy": any(name.endswith("_noise") for name in past.plan.get("privacy", {})),
        "rows": [
            {**apart[name], "name": name, "all": everywhere, "node": names.get(apart[name]["node"], apart[name]["node"])}
            for name in order
        ],
        "charts": list(filter(None, shown)),
        "dissimilarity": past.newest.get(UPDATES, {}),
    }


def _models(store: SqlStore, past: Past) -> list[dict[str, Any]]:
    """The best and the last model: which round made it, its digest, and a name for its file."""
    named = [(kind, round_) for kind, round_ in (("best", past.best), ("last", past.tally.last_round)) if round_]
    return [
        {"kind": kind, "round": row.round, "digest": row.model}
        for kind, round_ in named
        for row in store.rounds(past.run, round_, round_)
    ]


def _last(store: SqlStore, past: Past, nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each node its update in the last round, if it counted, and how it judges the newest model that it has judged."""
    found: dict[str, dict[str, Any]] = {node: {} for node in nodes}
    last = past.tally.last_round
    if nodes and last:
        for judged in store.evaluations(past.run, last - 1, nodes, last):
            found[judged.place]["judged"] = summary(judged.metrics)
        for update in store.updates(past.run, last, nodes):
            if update.status == "accepted":
                found[update.node]["update"] = update
    return found


def _rounds(store: SqlStore, past: Past, names: Mapping[str, str], page: int) -> dict[str, Any]:
    """One page of the closed rounds, the newest first, with what didn't count in them."""
    last = past.tally.last_round - (page - 1) * ROWS
    first = max(1, last - ROWS + 1)
    newest = page == 1
    refused: dict[int, list[dict[str, str]]] = {}
    for one in store.refused(past.run, first, last + (1 if newest else 0), _REFUSED):
        told = {"name": names.get(one.node, one.node), "status": one.status, "reason": one.reason}
        refused.setdefault(one.round, []).append(told)
    judged: dict[int, dict[str, Any]] = {}
    for row in store.evaluations(past.run, first, PLACES, last):
        if found := summary(row.metrics):
            judged.setdefault(row.round, {})[row.place] = found
    late = store.late(past.run, first, last)
    rows = [
        {
            "row": row,
            "judged": judged.get(row.round, {}).get("holdout") or judged.get(row.round, {}).get("nodes", {}),
            "refused": refused.get(row.round, []),
            "late": late.get(row.round, 0),
        }
        for row in reversed(store.rounds(past.run, first, last))
    ]
    open_ = [one for round_, told in refused.items() if round_ > last for one in told]
    return {"rows": rows, "open": open_, "newer": page - 1, "older": page + 1 if first > 1 and last > 0 else 0}


def _runs(store: SqlStore, current: str, page: int) -> dict[str, Any]:
    rows = store.runs((page - 1) * ROWS, ROWS + 1)
    listed = [{"row": row, "current": row.run == current} for row in rows[:ROWS]]
    return {"rows": listed, "newer": page - 1, "older": page + 1 if len(rows) > ROWS else 0}


def clock(seconds: float | None) -> str:
    """A moment as people read it: the time to the second; the date and the minute where it isn't today.

    >>> clock(None)
    ''
    """
    if seconds is None:
        return ""
    when, today = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M:%S" if when[:3] == today[:3] else "%Y-%m-%d %H:%M", when)


def span(seconds: float) -> str:
    """A length of time in the units that fit.

    >>> span(0.25), span(2.34), span(75), span(7260)
    ('0.25 s', '2.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def iso(seconds: float) -> str:
    """A moment as machines read it, in UTC.

    >>> iso(0)
    '1970-01-01T00:00:00Z'
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def figure(figures: Mapping[str, float], name: str) -> str:
    """A figure as text, or a dash where there is none.

    >>> figure({"loss": 0.5}, "loss"), figure({}, "loss")
    ('0.5000', '–')
    """
    if name not in figures:
        return "–"
    value = figures[name]
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


FILTERS = {"clock": clock, "span": span, "iso": iso}
