"""Clients that take no memory until they are asked: slices of one table, and what clients remember, in files.

A million clients are two arrays, of row numbers and of where each client's begin. The table itself may be mapped from files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms import Memory
from atoll.errors import DataError, GaveUpError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.simulate.partition import deviation, partition, shifted
from atoll.vector import Group, Groups, layouts_of
from atoll.wire import layouts_read, layouts_said, pack, unpack, words_of

_KEPT = 1 << 28
"""Bytes of clients' rows that are kept at hand."""
_IN_MEMORY = 1 << 28
"""Bytes of what clients remember that stay in memory."""


class _Parts:
    """Row numbers of each client, one client's after another's."""

    def __init__(self, parts: Sequence[NDArray[np.intp]]) -> None:
        self.bounds = np.cumsum([0, *map(len, parts)])
        self._order = np.concatenate(parts) if len(parts) else np.empty(0, np.intp)

    def __getitem__(self, number: int) -> NDArray[np.intp]:
        return self._order[self.bounds[number] : self.bounds[number + 1]]


class Spread(Mapping[str, Data]):
    """One table's rows, spread over clients `client-1`, `client-2`, …; a client's `Data` is made when it is asked for.

    Args:
        whole: the table, as it was read.
        parts: the training rows' numbers of each client.
        tests: the test rows' numbers of each client; empty where there are too few for all.
        plan: says what each client does with its own rows (standardising).
        shift: σ of the noise that each client's rows have in a strength of its own, see `partition.shifted`; 0 for none.
    """

    def __init__(
        self, whole: Data, parts: Sequence[NDArray[np.intp]], tests: Sequence[NDArray[np.intp]], plan: Plan, shift: float = 0.0
    ) -> None:
        self._shift = shift
        # As plain arrays, though they may be mapped: of numpy's own class for that each slice is slow.
        whole = Data(*(Rows(*map(np.asarray, rows)) for rows in whole))
        self._whole, self._plan, self._count = whole, plan, len(parts)
        self._parts, self._tests = _Parts(parts), _Parts(tests) if tests else None
        self._width = len(str(len(parts)))
        self._held: dict[str, Data] = {}
        self._size = 0

    @property
    def longest(self) -> int:
        """The most training rows that a client has."""
        return int(np.diff(self._parts.bounds).max())

    def name(self, number: int) -> str:
        """Return a client's name; they are counted from 0 here."""
        return f"client-{number + 1:0{self._width}}"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return map(self.name, range(self._count))

    def __getitem__(self, name: str) -> Data:
        if name not in self._held:
            number = self._number(name)
            if number is None:
                raise KeyError(name)
            made = self._made(number)
            if (size := sum(one.nbytes for rows in made for one in rows)) > _KEPT:
                return made
            if self._size + size > _KEPT:
                self._held, self._size = {}, 0
            self._held[name] = made
            self._size += size
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._number(name) is not None

    def _number(self, name: str) -> int | None:
        said = name.removeprefix("client-")
        number = int(said) - 1 if said.isdecimal() else -1
        return number if 0 <= number < self._count and self.name(number) == name else None

    def _made(self, number: int) -> Data:
        train, test = self._whole.train, self._whole.test
        mine, tested = self._parts[number], self._tests[number] if self._tests else np.empty(0, np.intp)
        data = Data(_taken(train, mine), _taken(test, tested))
        if self._shift:
            seed = self._plan.plan.seed
            x = shifted(np.concatenate([data.train.x, data.test.x]), self._shift, number + 1, self._count, seed)
            data = Data(Rows(x[: len(mine)], data.train.y), Rows(x[len(mine) :], data.test.y))
        if self._plan.data.standardise == "no":
            return data
        return prepare([*data.train, *(data.test if len(data.test) else ())], self._plan)


def _taken(rows: Rows, which: NDArray[np.intp]) -> Rows:
    """Return some rows; those that lie side by side, as they lie, so that what is mapped stays so."""
    side_by_side = len(which) > 0 and which[-1] - which[0] == len(which) - 1 and bool((np.diff(which) == 1).all())
    taken = slice(int(which[0]), int(which[-1]) + 1) if side_by_side else which
    return Rows(rows.x[taken], rows.y[taken])


def spread(whole: Data, clients: int, how: str, plan: Plan) -> Spread:
    """Spread a table over clients; `how` as `partition` takes it.

    Raises:
        DataError: as `partition`.
    """
    seed = plan.plan.seed
    parts = partition(whole.train.y, clients, how, seed)
    tests = partition(whole.test.y, clients, "time" if how == "time" else "iid", seed) if len(whole.test) >= clients else []
    return Spread(whole, parts, tests, plan, deviation(how) or 0.0)


def ready(plan: Plan, clients: Mapping[str, Any]) -> Mapping[str, Data]:
    """Return clients' rows, prepared; each has some, and there are enough clients.

    Raises:
        DataError: a client has no row.
        GaveUpError: there are too few.
    """
    data: Mapping[str, Data] = clients
    if not isinstance(clients, Spread):
        data = {name: source if isinstance(source, Data) else prepare(source, plan) for name, source in clients.items()}
        if empty := [name for name, one in data.items() if not len(one.train)]:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise DataError(f"client '{empty[0]}'{more} has no row to train on: leave it out, or spread the rows more evenly")
    if len(data) < plan.cohort.minimum:
        raise GaveUpError(f"{len(data)} clients: the plan's cohort.minimum is {plan.cohort.minimum}")
    return data


def longest(clients: Mapping[str, Data]) -> int:
    """Return the most training rows that a client has."""
    return clients.longest if isinstance(clients, Spread) else max(len(data.train) for data in clients.values())


def drawn(clients: Mapping[str, Data], count: int, seed: int) -> Callable[[int], list[str]]:
    """Return who is there in each round: so many clients, drawn anew, at a cost that doesn't grow with those registered."""
    name = clients.name if isinstance(clients, Spread) else list(clients).__getitem__

    def there(round_: int) -> list[str]:
        numbers = np.random.default_rng([seed, round_]).choice(len(clients), count, replace=False, shuffle=False)
        return [name(int(number)) for number in np.sort(numbers)]

    return there


class Memories:
    """What clients remember between rounds: the newest in memory, the others in files of a folder that goes with the run."""

    def __init__(self) -> None:
        self._near: dict[str, Memory] = {}
        self._far: set[str] = set()
        self._size = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, name: str) -> Memory:
        """Return what a client remembers; nothing at first."""
        if name in self._far:
            return loaded(self._file(name).read_bytes())
        return self._near.get(name, {})

    def put(self, name: str, memory: Memory) -> None:
        """Remember."""
        self._size += _size(memory) - _size(self._near.pop(name, {}))
        self._far.discard(name)
        self._near[name] = memory
        while self._size > _IN_MEMORY and len(self._near) > 1:
            oldest = next(iter(self._near))
            gone = self._near.pop(oldest)
            self._size -= _size(gone)
            self._far.add(oldest)
            self._file(oldest).write_bytes(dumped(gone))

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def _file(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="atoll-")
        return Path(self._folder.name) / name.encode().hex()


def dumped(groups: Groups) -> bytes:
    """Return groups as one safetensors file that knows its own layouts."""
    return b"".join(pack(groups, {"layouts": layouts_said(layouts_of(groups))}))


def loaded(content: bytes) -> dict[str, Group]:
    """Read back what `dumped` wrote."""
    return unpack(content, layouts_read(words_of(content)["layouts"]))[0]


def _size(memory: Memory) -> int:
    return sum(group.values.nbytes for group in memory.values())
