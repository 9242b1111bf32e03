"""Driving a machine: events go in one by one, the commands that come out are done, and time is the event loop's.

Enters: a machine's `transition` and what to do about each of its commands. Leaves: its present state. The one place
where a pure machine meets asyncio; the server's and the node's runtimes both stand on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

S = TypeVar("S")


class Drive(Generic[S]):
    """A machine in motion.

    Args:
        transition: (state, event) → (state, commands), pure.
        acts: what to do about each kind of command.
        failed: told when work that was set off fails.
    """

    state: S

    def __init__(
        self,
        transition: Callable[[S, Any], tuple[S, Sequence[Any]]],
        acts: Mapping[type, Callable[[Any], Awaitable[None]]],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._transition, self._acts, self._failed = transition, acts, failed
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, state: S, commands: Sequence[Any]) -> None:
        """Set the first state, and do what follows from it."""
        self.state = state
        await self._do(commands)

    async def happen(self, event: Any) -> None:
        """Let an event happen, and do what follows from it."""
        self.state, commands = self._transition(self.state, event)
        await self._do(commands)

    async def _do(self, commands: Sequence[Any]) -> None:
        for command in commands:
            await self._acts[type(command)](command)

    def wake(self, at: float, tick: Callable[[float], Any]) -> None:
        """Let `tick(now)` happen at a time."""
        asyncio.get_running_loop().call_at(at, lambda: self.spawn(self.happen(tick(self.now()))))

    def now(self) -> float:
        """The time, in seconds since some point before the machine began."""
        return asyncio.get_running_loop().time()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Set off work that goes on by itself, until it is done or this drive stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._failed(error)

    def stop(self) -> None:
        """Break off all work that is still going on."""
        for task in tuple(self._tasks):
            task.cancel()


@contextlib.contextmanager
def on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C and a request to terminate call `act` inside the block, where this thread and system can."""
    loop, added = asyncio.get_running_loop(), []
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(name, act)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            loop.remove_signal_handler(name)


def new_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop: uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:  # an optional part, and not made for every system
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
