"""What a node holds its server to: the key that it first saw, and every head of the run's record that it was shown.

The key stands in `known_servers` in the node's directory, a line for each address. The heads go to the ledger, so that whoever
alters the record later, even with the server's key, is found out by `atoll audit verify --ledger`.
"""

from __future__ import annotations

import time
from pathlib import Path

from atoll.chain import attested, signed
from atoll.errors import RefusedError, StoreError
from atoll.messages import ConnectionReceived, EndSession, Head, Message, Verdict
from atoll.store.ledger import Ledger, Seen


class Witness:
    """Checks and keeps what a server signs.

    Args:
        directory: the node's own.
        url: the server's address.
        ledger: where heads are kept.

    Raises:
        StoreError: what is known of servers can't be read.
    """

    def __init__(self, directory: Path, url: str, ledger: Ledger) -> None:
        self._path, self._url, self._ledger = directory / "known_servers", url.rstrip("/"), ledger
        self._heads: dict[str, dict[int, bytes]] = {}  # of every entry that was shown: as few bytes as it takes
        for one in ledger.heads():
            self._heads.setdefault(one.run, {})[one.number] = bytes.fromhex(one.head)
        self._key = self._known()

    def _known(self) -> str | None:
        try:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._path}: can't be read ({error}); mend it, or move it away to trust servers anew") from error
        return next((line.split()[1] for line in lines if line.split()[:1] == [self._url] and len(line.split()) == 2), None)

    def heard(self, message: Message, plan: str) -> Message:
        """Return a message once what it acknowledges by is checked; that is written with the ledger's next entry.

        Raises:
            RefusedError: it isn't the server that this address had; or that shows another record than before.
            StoreError: the server's key can't be kept.
        """
        if isinstance(message, ConnectionReceived):
            self._meets(message.key)
        if isinstance(message, ConnectionReceived | Verdict | EndSession):
            self._sees(message.run, plan, message.head)
        return message

    def _meets(self, key: str | None) -> None:
        if key == self._key:
            return
        if self._key is not None:
            raise RefusedError(
                f"{self._url} has {f'key {key[:12]}' if key else 'no key'}, but had {self._key[:12]} before: another server, or "
                f"one with a new store; where that is meant, remove its line from {self._path}"
            )
        try:
            with self._path.open("a") as file:
                file.write(f"{self._url} {key}\n")
        except OSError as error:
            raise StoreError(f"{self._path}: the server's key can't be kept there ({error.strerror})") from error
        self._key = key

    def _sees(self, run: str, plan: str, head: Head | None) -> None:
        if self._key is None:  # a server that signs nothing, and never did
            return
        if head is None or not attested(self._key, head.signature, signed(run, plan, head.number, head.digest)):
            raise RefusedError(f"{self._url}: what it says is not signed by its key {self._key[:12]}: it came from somebody else")
        self._ledger.saw(Seen(run, plan, head.number, head.digest, head.signature, self._key, time.time()))
        digest = bytes.fromhex(head.digest)
        if self._heads.setdefault(run, {}).setdefault(head.number, digest) != digest:
            raise RefusedError(
                f"{self._url}: entry {head.number} of run {run}'s record is not the one that it showed before: it was rewritten, "
                f"or goes on from an old copy; ask its operator for `atoll audit verify --ledger {self._path.parent}`"
            )
