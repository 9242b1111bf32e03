"""What it takes to check one large update before it counts: signature, digest, layout, finite numbers, norm."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atoll.keys import Identity
from atoll.logs import contents
from atoll.vector import Group, Layout, Tensor, Update, check
from atoll.wire import Address, decode, encode, seal

_REPEATS = 5
_MODEL = "0" * 64


def measure(parameters: int) -> dict[str, Any]:
    """Return how many GB of an update a core checks in a second of its own time, in all and by part; best of some tries."""
    layout = Layout((Tensor("all", (parameters,)),))
    values = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    parts = encode(Update({"parameters": Group(layout, values)}, 1.0), _MODEL)
    identity = Identity.new()
    envelope = seal(identity, Address("run", 1, 1, identity.node), _MODEL, parts)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "update"
        path.write_bytes(b"".join(parts))
        body = contents(path)

        def numbers() -> None:
            check(decode(body, {"parameters": layout}, _MODEL).groups, {"parameters": layout})

        def whole() -> None:
            envelope.verify()
            hashlib.sha256(body).hexdigest()
            numbers()

        timed = {"gb_per_s": whole, "sha256_gb_per_s": lambda: hashlib.sha256(body), "numbers_gb_per_s": numbers}
        found = {name: round(body.nbytes / _best(act) / 1e9, 2) for name, act in timed.items()}
        body.release()
    return {"mb": round(envelope.size / 1e6, 1), **found}


def _best(act: Callable[[], object]) -> float:
    """The least processor time that it took, in seconds."""
    taken = []
    for _ in range(_REPEATS):
        began = time.process_time()
        act()
        taken.append(time.process_time() - began)
    return min(taken)
