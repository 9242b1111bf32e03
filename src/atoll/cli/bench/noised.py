"""What noise costs: seconds of a node and of the server for one round under each mechanism, and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atoll.keys import new_secret
from atoll.privacy.dp import central, distributed, local
from atoll.privacy.dp.clip import clipped
from atoll.vector import Flat, Group, Layout, Layouts, Tensor


class _Same:
    """The same update of every node."""

    def __init__(self, group: Group, nodes: int) -> None:
        self.ids = [str(node) for node in range(nodes)]
        self.layouts: Layouts = {"parameters": group.layout}
        self._values = group.values

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        del group
        return [self._values[lo:hi]] * len(self.ids)


def measure(nodes: int, parameters: int, now: Callable[[], float]) -> list[dict[str, Any]]:
    """Return a row for central, distributed and local noise; seconds of a secure sum come to the distributed one's."""
    layout = Layout((Tensor("w", (parameters,)),))
    groups = {"parameters": Group(layout, np.random.default_rng(0).normal(0, 0.05, parameters).astype(np.float32))}
    bodies, about = _Same(groups["parameters"], nodes), {"nodes": nodes, "parameters": parameters}

    def serve() -> None:
        total = central.summed(1.0)(bodies, [1.0] * nodes, nodes)
        central.noised(total, bodies.layouts, 1.0, 1.0, central.fresh(new_secret()), nodes)

    def share() -> None:
        distributed.noisy(groups, 1.0, 1.0, nodes, new_secret())

    return [
        {
            "guard": "central noise",
            **about,
            "seconds": _best(lambda: clipped(groups, 1.0), now),
            "server_seconds": _best(serve, now),
            "bytes_per_float": 4,
        },
        {"guard": "distributed noise, to secagg", **about, "seconds": _best(share, now), "bytes_per_float": 8},
        {
            "guard": "local noise",
            **about,
            "seconds": _best(lambda: local.noisy(groups, 1.0, 1.0, new_secret()), now),
            "bytes_per_float": 4,
        },
    ]


def _best(act: Callable[[], object], now: Callable[[], float]) -> float:
    times = []
    for _ in range(3):
        began = now()
        act()
        times.append(now() - began)
    return round(min(times), 5)
