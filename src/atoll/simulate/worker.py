"""One process of strategy `pool`: `python -m atoll.simulate.worker FOLDER`.

The folder, in shared memory where there is any, holds the plan. Each line on stdin is a client's job: the files of what the
server sends, of the client's rows and of what it remembers. The answer is one line on stdout, and files that it names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from atoll import learners, method
from atoll.errors import AtollError, LayoutError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.simulate.clients import dumped, loaded
from atoll.simulate.map import Job, Work, one
from atoll.wire import encode

ARRAYS = ("x", "y", "x_test", "y_test")
KEPT = 1 << 29
"""Bytes of clients' rows that stay near the processes for later rounds."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""What a process's environment says, so that each has one thread of arithmetic."""


def rows(place: Path) -> Data:
    """Return a client's rows, mapped."""
    x, y, x_test, y_test = (_array(place / f"{name}.npy") for name in ARRAYS)
    return Data(Rows(x, y), Rows(x_test, y_test))


def _array(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.load(path, allow_pickle=False)
    return found if not found.size else np.load(path, mmap_mode="r", allow_pickle=False)


def _answer(work: Work, told: dict[str, Any]) -> dict[str, Any]:
    place = Path(told["into"])
    memory = loaded(Path(told["memory"]).read_bytes()) if told["memory"] else {}
    brief = loaded(Path(told["brief"]).read_bytes())
    job = Job(brief, told["round"], {told["name"]: (memory, rows(Path(told["rows"])))}, told["judged"])
    answer = one(work, job, told["name"])
    if isinstance(answer, AtollError):
        return {"error": str(answer), "layout": isinstance(answer, LayoutError)}
    after, update = answer
    place.write_bytes(b"".join(encode(update, "pool")))
    if after:
        place.with_suffix(".memory").write_bytes(dumped(after))
    return {"memory": bool(after)}


def _serve(folder: Path, out: TextIO) -> None:
    about = json.loads((folder / "about.json").read_text())
    plan = Plan.from_json(about["plan"])
    learner = learners.build(plan, about["allow"])
    work = Work(plan, method.find(plan, learner), learner)
    for line in sys.stdin:
        out.write(json.dumps(_answer(work, json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its processes itself
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a framework prints is no answer
    _serve(Path(sys.argv[1]), kept)
