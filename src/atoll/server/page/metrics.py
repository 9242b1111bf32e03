"""The current run's figures in Prometheus' text format 0.0.4.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/. No label holds a reason or a node's name: a
time series lives for ever, and a label that anybody can fill makes any number of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from atoll.server.page.past import PLACES, Past
from atoll.store import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Samples = Mapping[str, float]
"""What follows a metric's name (a suffix, labels) → its value."""


def exposition(status: Mapping[str, Any], past: Past) -> str:
    """Return the metrics of a run, one family after the other, each with HELP and TYPE."""
    lines = []
    for name, kind, said, samples in _families(status, past):
        if samples:
            lines += [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{more} {_number(value)}" for more, value in samples.items()]
    return "\n".join(lines) + "\n"


def _families(status: Mapping[str, Any], past: Past) -> Iterator[tuple[str, str, str, Samples]]:
    tally, newest, nodes = past.tally, past.newest, status["nodes"]
    connected = sum(one["connected"] for one in nodes)
    yield "atoll_run_info", "gauge", "The run that is served; always 1.", {f'{{run="{status["run"]}"}}': 1}
    yield "atoll_rounds_planned", "gauge", "Rounds that the plan asks for.", {"": status["rounds"]}
    yield "atoll_round", "gauge", "The round that is open, or next to open.", {"": status["round"]}
    yield "atoll_attempt", "gauge", "Which try of the open round it is, from 1.", {"": status["attempt"]}
    yield "atoll_rounds_total", "counter", "Closed rounds of the run.", {"": tally.rounds}
    yield (
        "atoll_round_seconds",
        "summary",
        "Seconds from asking the nodes to the new model.",
        {"_count": tally.rounds, "_sum": tally.seconds},
    )
    yield "atoll_received_bytes_total", "counter", "Bytes of the updates that counted.", {"": tally.bytes}
    yield (
        "atoll_updates_total",
        "counter",
        "What came from nodes, by what became of it.",
        {f'{{status="{kind}"}}': tally.updates.get(kind, 0) for kind in get_args(Status)},
    )
    yield "atoll_nodes", "gauge", "Nodes that ever joined the run.", {"": len(nodes)}
    yield "atoll_nodes_connected", "gauge", "Nodes that are connected now.", {"": connected}
    yield (
        "atoll_nodes_waited_for",
        "gauge",
        "Nodes whose update the open round still waits for.",
        {"": sum(bool(one.get("waited_for")) for one in nodes)},
    )
    yield (
        "atoll_nodes_held_out",
        "gauge",
        "Connected nodes that aren't asked because their updates were refused.",
        {"": sum(one["doing"] == "held_out" for one in nodes)},
    )
    spent = {} if past.epsilon is None else {"": past.epsilon}
    yield "atoll_epsilon", "gauge", "What the run's noise has let out by now, at the plan's delta.", spent
    yield "atoll_log_waiting", "gauge", "1 while the update log can't be read, else 0.", {"": bool(status["log_waiting"])}
    yield "atoll_store_waiting", "gauge", "1 while the store can't be written, else 0.", {"": bool(status["store_waiting"])}
    for figure, said in (("loss", "Mean loss of the newest judged model."), ("accuracy", "Accuracy of the newest judged model.")):
        judged = {f'{{on="{place}"}}': newest[place][figure] for place in PLACES if figure in newest.get(place, {})}
        yield f"atoll_{figure}", "gauge", said, judged
    others = {
        f'{{name="{_escaped(name)}",on="{place}"}}': value
        for place in PLACES
        for name, value in newest.get(place, {}).items()
        if name not in ("loss", "accuracy")
    }
    yield "atoll_figure", "gauge", "What else the newest judged model is judged by.", others
    # Under the name that every Prometheus client gives it, so that dashboards find it.
    yield "process_resident_memory_bytes", "gauge", "Resident memory of the server process.", _resident()


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _resident() -> Samples:
    """The server's resident memory, where the system tells it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"": pages * os.sysconf("SC_PAGE_SIZE")}


def _number(value: float) -> str:
    """A number as the format wants it: `NaN`, `+Inf`, `-Inf` by name."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
