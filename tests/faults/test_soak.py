"""A long run: memory, files and threads of the server and of its nodes stay what they were.

The short form is part of the tests; `make soak` runs a thousand rounds with twenty nodes.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.federation import atoll, clients, events, plan, say

from atoll.node.runtime import Node

NODES = 20


def use(pid: int | str) -> tuple[int, int, int]:
    """Resident bytes, open files and threads of a process."""
    said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(said["VmRSS"].split()[0]), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(said["Threads"])


def slope(values: np.ndarray, every: int) -> float:
    """Growth in a hundred rounds, as a part of the mean: a line through what was seen after the first half."""
    late = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(late)), late, 1)[0] * 100 / every / late.mean())


def soak(place: Path, rounds: int, every: int, patience: float) -> dict[str, np.ndarray]:
    """Run so many rounds; return what server and nodes used, [samples, (bytes, files, threads)]."""
    agreed = plan(plan={"rounds": rounds}, training={"epochs": 1}, cohort={"minimum": NODES, "quorum": 1.0, "deadline": 60})
    (place / "plan.json").write_text(agreed.to_json())
    seen: dict[str, list[tuple[int, int, int]]] = {"server": [], "nodes": []}

    async def join(url: str) -> None:
        data = clients(NODES)
        await asyncio.gather(*(Node(url, data[name], name=name, directory=place / name).start_async() for name in data))

    words = ["serve", place / "plan.json", "--port", "0", "--store", place / "store", "--json"]
    with atoll(*words, log=place / "server.log", patience=patience) as server:
        event: dict[str, Any] = {}
        for event in events(server):
            if event["what"] == "listening":
                joined = threading.Thread(target=asyncio.run, args=(join(event["url"]),))
                joined.start()
            if event["what"] == "round" and event["round"] % every == 0:
                seen["server"].append(use(server.pid))
                seen["nodes"].append(use("self"))
        joined.join()
    assert event.get("what") == "history", (place / "server.log").read_text()
    return {who: np.array(values) for who, values in seen.items()}


def stays(used: dict[str, np.ndarray], every: int, most: float) -> None:
    for who, seen in used.items():
        grows = slope(seen[:, 0], every)
        half = len(seen) // 2
        files, threads = seen[half:, 1], seen[half:, 2]
        say(
            f"{who}: {seen[-1, 0] / 1e6:.1f} MB, {100 * grows:+.2f} % in 100 rounds; files {files.min()}–{files.max()}, "
            f"threads {threads.min()}–{threads.max()}"
        )
        assert grows < most, f"{who}: {seen[:, 0]}"
        # Connections that do nothing for five seconds are closed, so there may be fewer; but never more.
        assert files.max() <= seen[:half, 1].max() + 2, f"{who}: {seen[:, 1]}"
        assert threads.max() <= seen[:half, 2].max() + 1, f"{who}: {seen[:, 2]}"


@pytest.mark.timeout(240)
def test_a_hundred_rounds_leave_nothing_behind(tmp_path):
    stays(soak(tmp_path, 100, 2, 200), 2, 0.05)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_rounds_leave_nothing_behind(tmp_path):
    stays(soak(tmp_path, 1000, 5, 3500), 5, 0.01)
