"""A simulation in a folder: after each round all that the next one needs, so that a run that was stopped can go on.

    run.json        plan, clients, how many rounds are closed, the machine's course and conduct
    rounds.jsonl    what was told of each round
    state           the algorithm's state
    memories/       what each client remembers, by the round that it is from

Each file is written beside and then put in its place; `run.json` comes last, and says which of the others count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from atoll.algorithms import Memory, State
from atoll.errors import StoreError
from atoll.plan import Plan
from atoll.server.events import Past
from atoll.server.offences import Conduct
from atoll.server.state import State as Machine
from atoll.simulate.clients import Memories, dumped, loaded
from atoll.stopping import Course


class Found(NamedTuple):
    """A run that goes on: what the machine knows, the state, what clients remember, and the rounds so far."""

    past: Past
    state: State
    memories: Mapping[str, Memory]
    rounds: list[dict[str, Any]]


class Checkpoint:
    """The folder of one run.

    Args:
        folder: made where it isn't there.
        plan: of the run.
        told: whatever else has to be the same for a run to go on, such as who its clients are.
    """

    def __init__(self, folder: Path, plan: Plan, told: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, {"plan": plan.digest, **told}

    def begin(self) -> None:
        """Begin anew.

        Raises:
            StoreError: another run is there, or the folder can't be made.
        """
        try:
            if (self._folder / "run.json").exists():
                raise StoreError(f"{self._folder}: a run is there already; go on with it (--resume), or name another folder")
            (self._folder / "memories").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: can't be written ({error.strerror}); name another folder") from error

    def save(
        self, machine: Machine, state: State, memories: Memories, names: Iterable[str], rounds: list[dict[str, Any]]
    ) -> None:
        """Keep a run whose newest round is closed; `names` are the clients that took part in it.

        Raises:
            StoreError: the disk is full, or can't be written.
        """
        closed, facts = rounds[-1]["round"], rounds[-1]
        try:
            self._put(f"state.{closed}", dumped(state))
            for name in names:
                if memory := memories.get(name):
                    self._put(f"memories/{name.encode().hex()}.{closed}", dumped(memory))
            with (self._folder / "rounds.jsonl").open("a") as lines:
                lines.write(json.dumps(facts) + "\n")
            known = {"closed": closed, "model": facts["model"], "answered": list(facts["answered"])}
            about = {**self._about, **known, "course": list(machine.course), "conduct": asdict(machine.conduct)}
            self._put("run.json", json.dumps(about).encode())
            (self._folder / f"state.{closed - 1}").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: can't be written ({error.strerror}); make room, then --resume") from error

    def _put(self, name: str, content: bytes) -> None:
        beside = self._folder / f"{name}.part"
        beside.write_bytes(content)
        beside.replace(self._folder / name)

    def find(self) -> Found:
        """Return the run that is there.

        Raises:
            StoreError: none is, or it is another plan's, or over other clients.
        """
        try:
            about = json.loads((self._folder / "run.json").read_text())
            closed = int(about["closed"])
            for key, value in self._about.items():
                if about[key] != value:
                    what = "of another plan" if key == "plan" else f"with another {key}, {about[key]}"
                    raise StoreError(f"{self._folder}: the run there is {what}; name another folder, or begin without --resume")
            lines = (self._folder / "rounds.jsonl").read_text().splitlines()
            told = {one["round"]: one for one in map(json.loads, lines) if one["round"] <= closed}
            rounds = [told[number] for number in sorted(told)]
            state = loaded((self._folder / f"state.{closed}").read_bytes())
            memories = {name: loaded(path.read_bytes()) for name, path in self._newest(closed).items()}
        except FileNotFoundError as error:
            raise StoreError(f"{self._folder}: no run is there to go on with; begin without --resume") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._folder}: the run there is damaged ({error!r}); begin another in a new folder") from error
        past = Past(
            closed=closed, attempt=1, tasks={}, names={}, model=about["model"], course=Course(*about["course"]),
            answered=tuple(about["answered"]), conduct=Conduct(**_frozen(about["conduct"])),
        )  # fmt: skip
        return Found(past, state, memories, rounds)

    def _newest(self, closed: int) -> dict[str, Path]:
        """Return each client's newest memory that counts; a later one is of a round that wasn't closed any more."""
        found: dict[str, tuple[int, Path]] = {}
        for path in (self._folder / "memories").glob("*.[0-9]*"):
            name, _, said = path.name.partition(".")
            if said.isdecimal() and found.get(name, (0, path))[0] <= int(said) <= closed:
                found[name] = int(said), path
        return {bytes.fromhex(name).decode(): path for name, (_, path) in found.items()}


def _frozen(value: Any) -> Any:
    """Lists as tuples, as they were before JSON."""
    if isinstance(value, dict):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
