"""What simulated clients run on: how fast they compute and send, when they are there, how often nothing comes of a task.

A TOML file, for `atoll simulate --devices`. Each client is of one kind, drawn by the kinds' shares; all draws follow from the
plan's seed and the client's name, so a run is the same each time, whatever the order of its events.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, ValidationError

from atoll.errors import AtollError
from atoll.sections import Fraction, Seconds, Section, seconds

_UNITS = {"kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "B/s": 1.0}


def _rate(value: object) -> object:
    """Turn "2MB/s" into bytes a second.

    >>> _rate("2.5MB/s")
    2500000.0
    """
    if not isinstance(value, str):
        return value
    for unit, size in _UNITS.items():
        if value.endswith(unit):
            try:
                return float(value.removesuffix(unit)) * size
            except ValueError:
                break
    raise ValueError('a speed is bytes a second, or text such as "200kB/s", "2MB/s"')


Rate = Annotated[PositiveFloat, BeforeValidator(_rate)]
Spread = Annotated[float, Field(ge=0, le=3)]
NoneOrMore = Annotated[float, Field(ge=0), BeforeValidator(seconds)]


class Kind(Section):
    """`[[kind]]`: devices that are alike.

    `share` is the part of all clients that are of this kind. `step` is what a training step takes, `down` and `up` how fast a
    model and an update travel, `latency` what passes before they begin to. `spread` is σ of the logarithm of a device's own
    slowness, drawn once for each, `jitter` the same for each task anew. Of `drop` of its tasks nothing comes, without a word.
    `online` and `offline` are how long a device is there and away in the mean, exponentially; without, it is always there.
    """

    share: Fraction = 1.0
    step: NoneOrMore = 0.0
    down: Rate | None = None
    up: Rate | None = None
    latency: NoneOrMore = 0.0
    spread: Spread = 0.0
    jitter: Spread = 0.0
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    online: Seconds | None = None
    offline: Seconds | None = None


class _File(Section):
    kind: Annotated[tuple[Kind, ...], Field(min_length=1)] = (Kind(),)
    trace: str | None = None


Spell = tuple[float, float]
"""From when to when a device is there, in seconds of the run."""


class Devices:
    """The devices of a run's clients.

    Args:
        kinds: what there is.
        seed: the plan's.
        trace: client → when it is there, in rising order; None where kinds say it.
    """

    def __init__(self, kinds: Sequence[Kind], seed: int, trace: Mapping[str, Sequence[Spell]] | None = None) -> None:
        self._kinds, self._seed, self._trace = tuple(kinds), seed, trace
        self._shares = np.cumsum([kind.share for kind in kinds]) / sum(kind.share for kind in kinds)
        self.come_and_go = trace is not None or any(kind.online and kind.offline for kind in kinds)

    @classmethod
    def load(cls, path: Path, seed: int) -> Devices:
        """Read a file.

        Raises:
            AtollError: it can't be read, or says what can't be.
        """
        try:
            told = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")), strict=False)
        except OSError as error:
            raise AtollError(f"--devices: {path} can't be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise AtollError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
        except ValueError as error:
            raise AtollError(f"{path}: no TOML: {error}") from error
        for kind in told.kind:
            if (kind.online is None) != (kind.offline is None):
                raise AtollError(
                    f"{path}: online and offline go together: name both, or neither for a device that is always there"
                )
        return cls(told.kind, seed, _read_trace(path.parent / told.trace) if told.trace else None)

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is known of them, as hex."""
        return hashlib.sha256(repr((self._kinds, self._trace)).encode()).hexdigest()

    def kind(self, name: str) -> Kind:
        """Of which kind a client is."""
        return self._kinds[int(np.searchsorted(self._shares, self._draws(name, "kind").random(), side="right"))]

    def takes(self, name: str, task: tuple[int, int], steps: int, down: int, up: int) -> float:
        """How long a client is at a task (round, attempt), in seconds: `down` bytes of a model, the steps, `up` bytes back."""
        kind = self.kind(name)
        slowness = float(np.exp(kind.spread * self._draws(name, "slowness").standard_normal()))
        slowness *= float(np.exp(kind.jitter * self._draws(name, "jitter", *task).standard_normal()))
        travel = (down / kind.down if kind.down else 0.0) + (up / kind.up if kind.up else 0.0)
        return 2 * kind.latency + travel + steps * kind.step * slowness

    def drops(self, name: str, task: tuple[int, int]) -> bool:
        """Whether nothing comes of a client's task (round, attempt)."""
        kind = self.kind(name)
        return kind.drop > 0 and self._draws(name, "drop", *task).random() < kind.drop

    def spells(self, name: str) -> Iterator[Spell]:
        """When a client is there; for ever where nothing says otherwise."""
        if self._trace is not None:
            yield from self._trace.get(name, ())
            return
        kind = self.kind(name)
        if not (kind.online and kind.offline):
            yield 0.0, float("inf")
            return
        rng = self._draws(name, "spells")
        there = rng.random() < kind.online / (
            kind.online + kind.offline
        )  # exponential spells have no memory: any moment is alike
        at = 0.0 if there else float(rng.exponential(kind.offline))
        while True:
            until = at + float(rng.exponential(kind.online))
            yield at, until
            at = until + float(rng.exponential(kind.offline))

    def _draws(self, name: str, *what: str | int) -> np.random.Generator:
        words = "\0".join(map(str, (self._seed, name, *what)))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "little"))


def _read_trace(path: Path) -> dict[str, list[Spell]]:
    """Read a CSV with the columns client, from, to; seconds since the run began."""
    found: dict[str, list[Spell]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines), 2):
                try:
                    spell = float(row["from"]), float(row["to"])
                    name = row["client"]
                except (KeyError, TypeError, ValueError):
                    raise AtollError(
                        f"{path}: line {number} isn't CLIENT,SECONDS,SECONDS under the header client,from,to"
                    ) from None
                if not 0 <= spell[0] < spell[1]:
                    raise AtollError(f"{path}: line {number}: a client is there from 0 or later, to later than that")
                found.setdefault(name, []).append(spell)
    except OSError as error:
        raise AtollError(f"trace: {path} can't be read ({error.strerror})") from error
    for name, spells in found.items():
        spells.sort()
        if any(one[1] >= after[0] for one, after in itertools.pairwise(spells)):
            raise AtollError(f"{path}: '{name}' is there twice at a time: its spells overlap or touch")
    return found
