"""Strategy `pool`: clients train in processes of their own, one thread of arithmetic each; rows and models in shared memory.

Nothing but lines of JSON goes through pipes, and no object is ever pickled: a process builds the plan's learner itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from atoll.algorithms import Memory
from atoll.errors import AtollError, LayoutError
from atoll.learner import Data, Rows
from atoll.simulate.clients import dumped, loaded
from atoll.simulate.map import Answer, Job, Work
from atoll.simulate.worker import ARRAYS, KEPT, ONE_THREAD
from atoll.vector import Groups, Metrics
from atoll.wire import decode

_SHARED = Path("/dev/shm")  # noqa: S108  the folder in it is made by tempfile


class Pool:
    """Processes that take clients one after the other; see `Strategy`.

    Args:
        work: what stays the same.
        workers: processes.
        allow: the functions that the plan may name.
    """

    name, said = "pool", ""

    def __init__(self, work: Work, workers: int, allow: Collection[str]) -> None:
        self._work = work
        self._folder = tempfile.TemporaryDirectory(prefix="atoll-", dir=_SHARED if _SHARED.is_dir() else None)
        self._place = Path(self._folder.name)
        about = {"plan": work.plan.to_json(), "allow": list(allow)}
        (self._place / "about.json").write_text(json.dumps(about))
        self._layouts = work.algorithm.updates(work.learner.layouts)
        self._held: dict[str, int] = {}
        environment = {**os.environ, **ONE_THREAD}
        command = [sys.executable, "-m", "atoll.simulate.worker", str(self._place)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(workers)
        ]
        self._free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(workers)

    def ready(self, holdout: Rows | None) -> None:
        """See `Strategy.ready`."""

    def train(self, job: Job) -> dict[str, Answer]:
        """See `Strategy.train`."""
        (self._place / "brief").write_bytes(dumped(job.brief))
        if sum(self._held.values()) > KEPT:
            self._drop()
        calls = [self._told(job, number, name) for number, name in enumerate(job.clients)]
        return dict(zip(job.clients, self._threads.map(self._asked, calls), strict=True))

    def _told(self, job: Job, number: int, name: str) -> dict[str, Any]:
        memory, data = job.clients[name]
        into = self._place / f"{number}.update"
        if memory:
            into.with_suffix(".before").write_bytes(dumped(memory))
        return {
            "name": name, "round": job.round, "judged": job.judged, "brief": str(self._place / "brief"), "into": str(into),
            "memory": str(into.with_suffix(".before")) if memory else None, "rows": str(self._shared(name, data)),
        }  # fmt: skip

    def _shared(self, name: str, data: Data) -> Path:
        """Put a client's rows where every process can map them."""
        place = self._place / f"rows-{name.encode().hex()}"
        if name not in self._held:
            place.mkdir()
            arrays = (*data.train, *data.test)
            for array_name, array in zip(ARRAYS, arrays, strict=True):
                np.save(place / f"{array_name}.npy", array, allow_pickle=False)
            self._held[name] = sum(array.nbytes for array in arrays)
        return place

    def _drop(self) -> None:
        for name in self._held:
            place = self._place / f"rows-{name.encode().hex()}"
            for array_name in ARRAYS:
                (place / f"{array_name}.npy").unlink()
            place.rmdir()
        self._held.clear()

    def _asked(self, told: dict[str, Any]) -> Answer:
        """Let the next free process do a client's work."""
        process = self._free.get()
        try:
            assert process.stdin  # noqa: S101  Popen was asked for pipes
            assert process.stdout  # noqa: S101
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            self._free.put(process)
        if not line:
            raise AtollError(f"{told['name']}: a process of the pool ended ({process.wait()}); take fewer --workers, or map")
        return self._read(told, json.loads(line))

    def _read(self, told: dict[str, Any], answer: dict[str, Any]) -> Answer:
        if "error" in answer:
            return (LayoutError if answer["layout"] else AtollError)(answer["error"])
        into = Path(told["into"])
        memory: Memory = loaded(into.with_suffix(".memory").read_bytes()) if answer["memory"] else {}
        return memory, decode(into.read_bytes(), self._layouts, "pool")

    def judge(self, model: Groups, parts: Sequence[Rows]) -> list[Metrics]:
        """See `Strategy.judge`."""
        return [self._work.learner.evaluate(model, rows) for rows in parts]

    def close(self) -> None:
        """End the processes, and remove the folder."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:  # first, or a run that is stopped would wait for its clients
            process.terminate()
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()
