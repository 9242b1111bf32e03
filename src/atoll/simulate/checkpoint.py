"""A simulation in a folder: after each round all that the next one needs, so that a run that was stopped can go on.

    run.json        plan, clients, the machine as the round closes, and what is still to come
    rounds.jsonl    what was told of each round
    state           the algorithm's state
    given           the model that clients have, where they get to it by steps
    memories/       what each client remembers, by the round that it is from
    open/           updates that are in no model yet, with what their clients will remember; models that clients work from

Each file is written beside and then put in its place; `run.json` comes last, and says which of the others count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from atoll.algorithms import Memory, State
from atoll.errors import LayoutError, StoreError, WireError
from atoll.plan import Plan
from atoll.server import events
from atoll.server.state import State as Machine
from atoll.simulate.clients import dumped, loaded
from atoll.simulate.clock import Coming
from atoll.simulate.cohort import Given, Open
from atoll.vector import Groups


class Kept(NamedTuple):
    """A run whose newest round is folded, just before the machine learns of it.

    Args:
        server: the machine.
        closed: what it is about to learn.
        state: the algorithm's state.
        rounds: what was told of each round.
        memories: what clients remember: to be kept, those whose updates are in the newest model; as found, all of them.
        open: the updates that are in no model yet.
        briefs: what clients made of the models that they still work from, by digest.
        coming: what is still to come.
        given: the model that clients have, where they get to it by steps.
    """

    server: Machine
    closed: events.Closed
    state: State
    rounds: list[dict[str, Any]]
    memories: Mapping[str, Memory]
    open: Mapping[str, Open]
    briefs: Mapping[str, Groups]
    coming: Coming
    given: Given | None


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
            for name in ("memories", "open"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            (self._folder / "rounds.jsonl").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: can't be written ({error.strerror}); name another folder") from error

    def save(self, kept: Kept) -> None:
        """Keep a run.

        Raises:
            StoreError: the disk is full, or can't be written.
        """
        facts = kept.rounds[-1]
        closed = facts["round"]
        try:
            self._put(f"state.{closed}", dumped(kept.state))
            if kept.given:
                self._put(f"given.{closed}", dumped(kept.given.model))
            for name, memory in kept.memories.items():
                self._put(f"memories/{name.encode().hex()}.{closed}", dumped(memory))
            files = {f"{model}.model": brief for model, brief in kept.briefs.items()}
            files |= {_file(name, one.task, "update"): one.update.groups for name, one in kept.open.items()}
            files |= {_file(name, one.task, "memory"): one.memory for name, one in kept.open.items() if one.memory}
            there = {path.name for path in (self._folder / "open").iterdir()}
            for name in files.keys() - there:  # none of them ever changes
                self._put(f"open/{name}", dumped(files[name]))
            with (self._folder / "rounds.jsonl").open("a") as lines:
                lines.write(json.dumps(facts) + "\n")
            self._put("run.json", json.dumps({**self._about, "closed": closed, **self._said(kept)}).encode())
            for name in (f"state.{closed - 1}", f"given.{closed - 1}", *(f"open/{name}" for name in there - files.keys())):
                (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: can't be written ({error.strerror}); make room, then --resume") from error

    def _said(self, kept: Kept) -> dict[str, Any]:
        """Return what is no array as plain values; of clients that are all there, no list."""
        server, (at, coming, seen, until) = kept.server, kept.coming
        everybody, here = len(server.names) == self._about["clients"], len(server.present) == len(server.names)
        kept_server = replace(
            server, secret=b"", names={} if everybody else server.names, present=frozenset() if here else server.present
        )  # a fresh secret will do
        return {
            "everybody": everybody,
            "here": here,
            "server": _plain(kept_server),
            "event": _plain(kept.closed),
            "open": {name: one.said for name, one in kept.open.items()},
            "briefs": list(kept.briefs),
            "given": kept.given and (sorted(kept.given.had), kept.given.step),
            "coming": (at, [(when, (type(event).__name__, _plain(event))) for when, event in coming], seen, until),
        }

    def _put(self, name: str, content: bytes) -> None:
        beside = self._folder / f"{name}.part"
        beside.write_bytes(content)
        beside.replace(self._folder / name)

    def find(self, clients: Iterable[str]) -> Kept:
        """Return the run that is there, over clients of these names.

        Raises:
            StoreError: none is, or it is another plan's, or over other clients.
        """
        try:
            about = json.loads((self._folder / "run.json").read_text())
            for key, value in self._about.items():
                if about.get(key) != value:
                    known = {"plan": "of another plan", "devices": "on other devices"}
                    what = known.get(key, f"with another {key}, {about.get(key)}")
                    raise StoreError(f"{self._folder}: the run there is {what}; name another folder, or begin without --resume")
            return self._read(about, clients)
        except FileNotFoundError as error:
            raise StoreError(f"{self._folder}: no run is there to go on with; begin without --resume") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, WireError, LayoutError) as error:
            what = f"{type(error).__name__}: {error}".replace("\n", " ")[:120]
            raise StoreError(
                f"{self._folder}: the run there is damaged, or another version's ({what}); begin another in a new folder"
            ) from error

    def _read(self, about: Mapping[str, Any], clients: Iterable[str]) -> Kept:
        closed = int(about["closed"])
        server: Machine = _adapter("State").validate_python(about["server"])
        if about["everybody"]:
            server = replace(server, names={name: name for name in clients})
        if about["here"]:
            server = replace(server, present=frozenset(server.names))
        opened = {name: Open.read(said, partial(self._part, name, said["task"])) for name, said in about["open"].items()}
        at, coming, seen, until = about["coming"]
        had, step = about["given"] or ((), None)
        return Kept(
            server=server,
            closed=_adapter("Closed").validate_python(about["event"]),
            state=self._groups(f"state.{closed}"),
            rounds=self._rounds(closed),
            memories={name: loaded(path.read_bytes()) for name, path in self._newest(closed).items()},
            open=opened,
            briefs={model: self._groups(f"open/{model}.model") for model in about["briefs"]},
            coming=Coming(at, [(when, _adapter(said[0]).validate_python(said[1])) for when, said in coming], seen, until),
            given=Given(self._groups(f"given.{closed}"), frozenset(had), step) if about["given"] else None,
        )

    def _part(self, name: str, task: Sequence[int], what: str) -> Groups:
        return self._groups(f"open/{_file(name, task, what)}")

    def _groups(self, name: str) -> dict[str, Any]:
        return loaded((self._folder / name).read_bytes())

    def _rounds(self, closed: int) -> list[dict[str, Any]]:
        """Return what was told of the rounds; a line behind them, of a round that wasn't kept any more, may be cut off."""
        lines = (self._folder / "rounds.jsonl").read_text().splitlines()[:closed]
        if len(lines) < closed:
            raise ValueError(f"rounds.jsonl tells of {len(lines)} of {closed} rounds")
        self._put("rounds.jsonl", "".join(f"{line}\n" for line in lines).encode())
        return [json.loads(line) for line in lines]

    def _newest(self, closed: int) -> dict[str, Path]:
        """Return each client's newest memory that counts; a later one is of a round that wasn't closed any more."""
        found: dict[str, tuple[int, Path]] = {}
        for path in (self._folder / "memories").glob("*.[0-9]*"):
            name, _, said = path.name.partition(".")
            if said.isdecimal() and found.get(name, (0, path))[0] <= int(said) <= closed:
                found[name] = int(said), path
        return {bytes.fromhex(name).decode(): path for name, (_, path) in found.items()}


def trained_by(folder: Path) -> str | None:
    """Return the strategy of the run in a folder: what was the fastest once needn't be so again."""
    try:
        return str(json.loads((folder / "run.json").read_text())["strategy"])
    except (OSError, ValueError, KeyError):  # whoever goes on with it says what is wrong
        return None


def _file(name: str, task: Sequence[int], what: str) -> str:
    return f"{name.encode().hex()}.{task[0]}.{task[1]}.{what}"


_KINDS: Mapping[str, type[Any]] = {
    one.__name__: one
    for one in (
        Machine, events.Closed, events.Joined, events.Lost, events.Appended, events.Refused, events.Declined, events.Tick,
    )
}  # fmt: skip
"""What is kept as plain values: the machine, what it is about to learn, and what can be to come."""


def _plain(value: Any) -> Any:
    return _adapter(type(value).__name__).dump_python(value, mode="json")


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind])
