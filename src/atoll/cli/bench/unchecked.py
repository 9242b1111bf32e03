"""Rounds without signatures, checks and the record, in processes of `bench rounds` only, to see what they cost.

Of three rounds the first is as ever. The second goes, on both sides, without signatures made and checked, the pass over the
numbers, the record's entries, their signatures, and the heads that nodes check. The third also goes without hashes of what
arrives, models and updates; who sends one still names it by its hash.
Nothing outside of that benchmark can do this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atoll.chain import Chain, Noted
from atoll.durable import write_all
from atoll.keys import Identity
from atoll.logs.bodies import Incoming
from atoll.node import download, witness
from atoll.node.runtime import Node
from atoll.server import intake
from atoll.store import sql
from atoll.wire import Envelope


class Switch:
    """What is on in this process."""

    checks = hashes = True

    @classmethod
    def turn(cls, round_: int) -> None:
        """Begin a round."""
        cls.checks, cls.hashes = round_ % 3 == 1, round_ % 3 != 0


def install() -> None:
    """Put the switch into this process."""
    _either(Identity, "sign", lambda *_: bytes(64))
    _either(Envelope, "verify", lambda *_: None)
    _either(intake, "check", lambda *_: 0.0)
    _either(Chain, "next", lambda self, _: self.last or Noted("", 0, "", "0" * 64, "0" * 128))
    _either(sql, "_chain", lambda *_: None)
    _either(witness, "attested", lambda *_: True)
    _either(download, "finite", lambda *_: True)
    digest, write = vars(Incoming)["digest"].fget, Incoming.write

    def unhashed(self: Any, lump: Any) -> None:
        if Switch.hashes:
            write(self, lump)
            return
        for chunk in lump:
            self.size += len(chunk)
            write_all(self._file, chunk)

    # A file's name ends with the digest that its body should have.
    Incoming.digest = property(lambda self: digest(self) if Switch.hashes else self._path.stem.rpartition("-")[2])  # type: ignore[assignment]
    Incoming.write = unhashed  # type: ignore[method-assign]


def _either(owner: Any, name: str, instead: Callable[..., Any]) -> None:
    own = getattr(owner, name)
    setattr(owner, name, lambda *words: own(*words) if Switch.checks else instead(*words))


class Turning(Node):
    """A node that takes part in the switching."""

    async def start_training(self, task: Any) -> None:
        """Be asked."""
        Switch.turn(task.round)
        await super().start_training(task)
