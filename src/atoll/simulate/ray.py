"""Backend `ray`: a strategy's work in processes of a Ray cluster, on this machine or on many.

Arrays and bytes go to them, never an object of Atoll's: like a pool's, a process builds the plan's learner itself. What a call
holds is settled here, as without a cluster, so the result is that of one process with the same strategy.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a cluster of this machine listens on loopback alone
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")

import ray

from atoll import __version__, learners, method
from atoll.algorithms import Memory
from atoll.errors import AtollError, LayoutError
from atoll.learner import Call, Data, How, Rows
from atoll.plan import Plan
from atoll.simulate.clients import dumped, loaded
from atoll.simulate.map import Answer, Job, Work, one
from atoll.simulate.vectorised import together
from atoll.simulate.worker import KEPT, ONE_THREAD
from atoll.vector import Groups, Metrics
from atoll.wire import decode, encode


class Hand:
    """What runs in one process of the cluster; takes and gives bytes, arrays and text.

    Args:
        plan: its JSON.
        allow: the functions that it may name.
        version: of the Atoll that asks.

    Raises:
        AtollError: another Atoll is installed there, or a part that the plan needs isn't.
    """

    def __init__(self, plan: str, allow: Collection[str], version: str) -> None:
        if version != __version__:
            raise AtollError(f"a machine of the cluster has Atoll {__version__}, this one {version}: install the same on all")
        agreed = Plan.from_json(plan)
        learner = learners.build(agreed, allow)
        self._work = Work(agreed, method.find(agreed, learner), learner)
        self._calls: dict[How, Call] = {}

    def ready(self) -> None:
        """Say that it is there."""

    def one(self, name: str, round_: int, brief: bytes, memory: bytes, *arrays: NDArray[Any], judged: bool) -> tuple[Any, ...]:
        """Do one client's work; return its memory and its update, or what went wrong and whether it was a layout."""
        data = Data(Rows(*arrays[:2]), Rows(*arrays[2:]))
        job = Job(loaded(brief), round_, {name: (loaded(memory) if memory else {}, data)}, judged)
        answer = one(self._work, job, name)
        if isinstance(answer, AtollError):
            return str(answer), isinstance(answer, LayoutError)
        return dumped(answer[0]) if answer[0] else b"", b"".join(encode(answer[1], "ray"))

    def call(self, how: How, kind: tuple[bool, int], *arrays: Any) -> Any:
        """Carry out a compiled call."""
        if how not in self._calls:
            self._calls[how] = together(self._work.learner).fits(how)
        return self._calls[how](kind, *arrays)


class Cluster:
    """Processes of a Ray cluster, each with a `Hand`.

    Args:
        address: of a running cluster, "host:port"; None starts one on this machine, which ends with `close`.
        work: what stays the same.
        workers: processes; None for one a processor of the cluster.
        allow: the functions that the plan may name.

    Raises:
        AtollError: no cluster is there, or its machines lack something.
    """

    def __init__(self, address: str | None, work: Work, workers: int | None, allow: Collection[str]) -> None:
        if address:
            _reached(address)
        self._folder = tempfile.TemporaryDirectory(prefix="atoll-", ignore_cleanup_errors=True)
        told: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        here = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False, "_temp_dir": self._folder.name}
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())]))  # functions beside the plan
        lent = {"env_vars": {"PYTHONPATH": paths, **ONE_THREAD}}
        try:
            ray.init(**told, **({"address": address} if address else here))
            self.workers = workers or int(cast("Any", ray).cluster_resources()["CPU"])
            made: Any = ray.remote(num_cpus=1, runtime_env=lent)(Hand)
            hands = [made.remote(work.plan.to_json(), list(allow), __version__) for _ in range(self.workers)]
            _got([hand.ready.remote() for hand in hands])
        except BaseException as error:
            self.close()
            if isinstance(error, ConnectionError | ValueError | TimeoutError | RuntimeError):
                where = f"ray:{address}" if address else "ray"
                raise AtollError(
                    f"--backend {where}: no cluster can be had ({_line(error)}); RAY_AUTH_MODE=token, where it asks for one"
                ) from error
            raise
        self._free: SimpleQueue[Any] = SimpleQueue()
        for hand in hands:
            self._free.put(hand)

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Let the next free process do something, and return what it gives."""
        hand = self._free.get()
        try:
            return _got(getattr(hand, method).remote(*arguments, **named))
        finally:
            self._free.put(hand)

    def call(self, how: How) -> Callable[..., Any]:
        """Return what carries out the compiled calls of a strategy."""
        return partial(self.ask, "call", how)

    def close(self) -> None:
        """Leave the cluster; one of this machine ends."""
        ray.shutdown()
        self._folder.cleanup()


def _reached(address: str) -> None:
    """See whether somebody listens there: Ray itself asks for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise AtollError(f"--backend ray:{address}: it is ray:HOST:PORT, the address that `ray start --head` printed")
    try:
        socket.create_connection((host, int(port)), 10).close()
    except (OSError, OverflowError) as error:
        raise AtollError(
            f"--backend ray:{address}: nobody listens there ({error}); `ray start --head` starts a cluster"
        ) from error


def _got(references: Any) -> Any:
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        raise AtollError(_line(error.cause)) from error
    except ray.exceptions.RayError as error:
        raise AtollError(f"a process of the Ray cluster ended ({_line(error)}); take fewer --workers, or no --backend") from error


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


class Apart:
    """Strategies `map` and `pool` on a cluster: a client is a process's job; see `Strategy`.

    Args:
        name: what the strategy is called.
        work: what stays the same.
        cluster: where.
    """

    said = ""

    def __init__(self, name: str, work: Work, cluster: Cluster) -> None:
        self.name, self._work, self._cluster = name, work, cluster
        self._layouts = work.algorithm.updates(work.learner.layouts)
        self._threads = ThreadPoolExecutor(cluster.workers)
        self._held: dict[str, list[Any]] = {}
        self._size = 0

    def ready(self, holdout: Rows | None) -> None:
        """See `Strategy.ready`."""

    def train(self, job: Job) -> dict[str, Answer]:
        """See `Strategy.train`."""
        brief = ray.put(dumped(job.brief))
        if self._size > KEPT:
            self._held.clear()
            self._size = 0
        rows = [self._rows(name, data) for name, (_, data) in job.clients.items()]
        return dict(zip(job.clients, self._threads.map(partial(self._asked, job, brief), job.clients, rows), strict=True))

    def _rows(self, name: str, data: Data) -> list[Any]:
        """Put a client's rows where every process can map them."""
        if name not in self._held:
            arrays = (*data.train, *data.test)
            self._held[name] = [ray.put(np.asarray(array)) for array in arrays]
            self._size += sum(array.nbytes for array in arrays)
        return self._held[name]

    def _asked(self, job: Job, brief: Any, name: str, rows: Sequence[Any]) -> Answer:
        before = job.clients[name][0]
        memory, update = self._cluster.ask(
            "one", name, job.round, brief, dumped(before) if before else b"", *rows, judged=job.judged
        )
        if isinstance(update, bool):
            return (LayoutError if update else AtollError)(memory)
        after: Memory = loaded(memory) if memory else {}
        return after, decode(update, self._layouts, "ray")

    def judge(self, model: Groups, parts: Sequence[Rows]) -> list[Metrics]:
        """See `Strategy.judge`."""
        return [self._work.learner.evaluate(model, rows) for rows in parts]

    def close(self) -> None:
        """See `Strategy.close`."""
        self._threads.shutdown(cancel_futures=True)
        self._held.clear()
