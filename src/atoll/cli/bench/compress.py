"""What each stage of compression costs: gigabytes of float32 a second, in and out, and bytes a number, beside a plain copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from atoll.compression import Press, stages
from atoll.vector import Group, Layout, Tensor, layouts_of

CHAINS = (
    *((one,) for one in ("bfloat16", "8bit", "4bit", "rotate", "topk:0.01", "randomk:0.01", "powersgd:4")),
    *(("rotate", "4bit"), ("topk:0.01", "8bit"), ("powersgd:4", "8bit")),
)
_REPEATS = 5


def measure(parameters: int) -> list[dict[str, Any]]:
    """Return a row for each chain: the best of some tries, in processor time of one thread: a busy machine disturbs it less.

    Error feedback is part of encoding where a stage leaves something out. The vector is one square matrix, as far as it goes.
    """
    side = max(2, int(parameters**0.5))
    layout = Layout((Tensor("matrix", (side, side)), Tensor("rest", (max(0, parameters - side * side),))))
    sent = {"parameters": Group(layout, np.random.default_rng(0).standard_normal(layout.size, dtype=np.float32))}
    gigabytes = layout.nbytes / 1e9
    copied = np.empty_like(sent["parameters"].values)
    rows: list[dict[str, Any]] = [
        {"method": "copy", "copy_gb_per_s": round(gigabytes / _best(lambda: np.copyto(copied, sent["parameters"].values)), 3)}
    ]
    for said in CHAINS:
        press = Press(stages(said), 0)
        small, memory = press.encode(sent, {}, 1, "bench")
        encoding = _best(lambda press=press, memory=memory: press.encode(sent, memory, 2, "bench"))  # type: ignore[misc]
        opening = _best(lambda press=press, small=small: press.decode(small, layouts_of(sent), 1))  # type: ignore[misc]
        rows.append(
            {
                "method": "+".join(said),
                "encode_gb_per_s": round(gigabytes / encoding, 3),
                "decode_gb_per_s": round(gigabytes / opening, 3),
                "bytes_per_float": round(sum(group.values.nbytes for group in small.values()) / layout.size, 4),
            }
        )
    return rows


def _best(act: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.thread_time()
        act()
        times.append(time.thread_time() - began)
    return min(times)
