"""What nodes said to the plan's link in a round: kept, so that a replay makes the same sum, or another server goes on with it.

One JSON file a round, `sums/RUN/ROUND.json` in the store: the attempt, and of each phase that was collected who answered what.
The link's state follows from it, whoever computes it. It is on the disk before the last phase is asked, since what nodes
give there they give for the sum over these nodes alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from atoll.algorithms.folds import mean
from atoll.durable import write_durably
from atoll.errors import PrivacyError, StoreError, UnwritableError
from atoll.messages import UPDATE
from atoll.plan import Plan
from atoll.privacy import bucketing
from atoll.privacy.choose import terms
from atoll.privacy.link import Letters, Link, Own
from atoll.server.close import Guard
from atoll.vector import Layouts, Total

PLACE = "sums"
VERSION = 2
"""Of what nodes say, and what follows from it; 2: masks are made by `atoll.keys.Pad`."""
Said = tuple[str, Letters]
"""A phase, and what nodes answered in it; in `UPDATE` only who they are counts."""


class Transcript(NamedTuple):
    """What was said in a try of a round, phase by phase; and the digest of the model that was trained."""

    attempt: int
    model: str
    said: tuple[Said, ...] = ()

    @property
    def summed(self) -> tuple[str, ...]:
        """The nodes whose updates are in the sum; none where it didn't come so far."""
        return next((tuple(letters) for phase, letters in self.said if phase == UPDATE), ())

    def of(self, phase: str) -> Letters | None:
        """What was answered in a phase, if it was collected."""
        return next((letters for one, letters in self.said if one == phase), None)


def path_of(directory: Path, run: str, round_: int) -> Path:
    """Return where a round's transcript lies in a store."""
    return directory / PLACE / run / f"{round_}.json"


def write(path: Path, transcript: Transcript) -> None:
    """Keep a transcript, durably.

    Raises:
        UnwritableError: the disk doesn't take it.
    """
    said = [
        [phase, {node: base64.b64encode(body).decode() for node, body in letters.items()}] for phase, letters in transcript.said
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"version": VERSION, "attempt": transcript.attempt, "model": transcript.model, "said": said}
        write_durably(path, [json.dumps(kept).encode()])
    except OSError as error:
        raise UnwritableError(f"{path}: what nodes said can't be stored ({error.strerror}); free some space") from error


def read(path: Path) -> Transcript | None:
    """Return a transcript; None where there is none.

    Raises:
        StoreError: the file is damaged, can't be read, or is another version's.
    """
    try:
        kept = json.loads(path.read_bytes())
        if kept.get("version", 1) != VERSION:
            raise StoreError(
                f"{path}: kept by a version of Atoll that masked otherwise ({kept.get('version', 1)}; this one: {VERSION}); "
                "replay it, or go on with the run, by that version"
            )
        said = tuple(
            (phase, {node: base64.b64decode(body, validate=True) for node, body in letters.items()})
            for phase, letters in kept["said"]
        )
        return Transcript(int(kept["attempt"]), str(kept["model"]), said)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: what nodes said in this round can't be read: {error!r}") from error


def after(link: Link, own: Own, said: Sequence[Said]) -> tuple[Own, Letters]:
    """Return the link's state after some phases, and its messages for the next one.

    Raises:
        PrivacyError: it refuses what was said.
    """
    out: Letters = {}
    for phase, letters in said:
        own, out = link.close(own, list(letters)) if phase == UPDATE else link.collect(own, phase, letters)
    return own, out


def whole(link: Link, path: Path, tried: tuple[int, int], letters: Letters) -> Letters:
    """Return the last phase's answers; where nodes opened a sum, they say its digest, and it lies in a file beside `path`.

    An answer whose file is gone, or isn't what it was, is left out.
    """
    if not link.opens:
        return letters
    found = {}
    for node, said in letters.items():
        file = path.parent / f"{tried[0]}-{tried[1]}-{node}-{said.hex()}.safetensors"
        if file.is_file() and hashlib.sha256(body := file.read_bytes()).digest() == said:
            found[node] = body
    return found


def replayed(link: Link, plan: Plan, layouts: Layouts, path: Path, run: str, round_: int) -> Guard:
    """Return how a closed round's updates are read, added up and made out once more.

    Args:
        link: the plan's.
        plan: what everyone agreed to.
        layouts: of a protected update's groups.
        path: of the round's transcript.
        run: which run.
        round_: which of its rounds.

    Raises:
        StoreError: the transcript is gone, or isn't what it was.
    """
    kept = read(path)
    if kept is None or not kept.said:
        raise StoreError(f"{path}: what nodes said in round {round_} is gone, and without it its sum can't be made again")
    *before, (_, last) = kept.said
    wrong = f"{path}: what nodes said in round {round_} isn't what it was"
    try:
        own, _ = after(link, link.begin(terms(plan, run, round_, kept.attempt, kept.model)), before)
    except PrivacyError as error:
        raise StoreError(f"{wrong}: {error}") from error

    def undo(total: Total, nodes: Sequence[str]) -> Total:
        try:
            return bucketing.undo(link, own, whole(link, path, (round_, kept.attempt), last), total, nodes).total
        except PrivacyError as error:
            raise StoreError(f"{wrong}: {error}") from error

    return Guard(layouts, mean, undo, bucketing.apart(link, own))
