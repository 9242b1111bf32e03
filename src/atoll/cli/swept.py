"""What is done of a sweep, in a folder: a row for each run that came to its end, and the run that Ctrl-C stopped in its middle.

sweep.json        what all runs have in common: data, clients, strategy
DIGEST.json       a run that came to its end, named by its plan
DIGEST/           one that is under way or broke off, as `atoll.simulate.checkpoint` keeps it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from atoll.errors import StoreError
from atoll.plan import Plan


class Swept(NamedTuple):
    """A sweep's folder, or none: then nothing is kept."""

    folder: Path | None

    @classmethod
    def opened(cls, folder: Path | None, about: Mapping[str, Any], *, resume: bool) -> Swept:
        """Begin a sweep in a folder, or go on with the one that is there.

        Args:
            folder: where; None keeps nothing.
            about: what all runs have in common.
            resume: whether to go on.

        Raises:
            StoreError: there is none, or another one, or it can't be read or written.
        """
        if folder is None:
            if resume:
                raise StoreError("--resume: name the folder of the sweep that goes on, --store")
            return cls(None)
        place, said = folder / "sweep.json", {name: str(value) for name, value in about.items()}
        try:
            if not resume:
                if place.exists():
                    raise StoreError(f"{folder}: a sweep is there already; go on with it (--resume), or name another folder")
                folder.mkdir(parents=True, exist_ok=True)
                _put(place, said)
                return cls(folder)
            if not place.exists():
                raise StoreError(f"{folder}: no sweep is there to go on with; begin without --resume")
            there = dict(json.loads(place.read_text()))
        except OSError as error:
            raise StoreError(f"{folder}: can't be used ({error.strerror}); name another folder") from error
        except (ValueError, TypeError) as error:
            raise StoreError(f"{place}: is damaged; begin another sweep in a new folder") from error
        for name, value in said.items():
            if there.get(name) != value:
                raise StoreError(f"{folder}: the sweep there has --{name} {there.get(name)}, not {value}: name another folder")
        return cls(folder)

    @property
    def said(self) -> str:
        """How a sweep goes on that was stopped."""
        if self.folder is None:
            return "what is done is shown; with --store FOLDER a sweep that is stopped can go on"
        return f"what is done is kept in {self.folder}: the same command with --resume goes on"

    def row(self, plan: Plan, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Return what a plan's run gave; made by `run(store=…, resume=…)` where it isn't there yet.

        Raises:
            StoreError: the folder can't be read or written.
        """
        if self.folder is None:
            return run()
        place, under_way = self.folder / f"{plan.digest}.json", self.folder / plan.digest
        try:
            if place.exists():
                return dict(json.loads(place.read_text()))
        except (OSError, ValueError) as error:
            raise StoreError(f"{place}: can't be read, or is damaged; remove it, then --resume") from error
        row = run(store=under_way, resume=(under_way / "run.json").exists())
        if row["why"]:  # tried again the next time: what was in its way may be gone
            return row
        try:
            _put(place, row)
        except OSError as error:
            raise StoreError(f"{self.folder}: can't be written ({error.strerror}); make room, then --resume") from error
        shutil.rmtree(under_way, ignore_errors=True)
        return row


def _put(place: Path, value: Mapping[str, Any]) -> None:
    beside = place.with_suffix(".part")
    beside.write_text(json.dumps(value))
    beside.replace(place)
