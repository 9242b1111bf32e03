"""What passes on the control channel: small pydantic models, each with the protocol's version.

Anything of model size goes elsewhere: models by digest over HTTP, updates to the log. The events' names
are the talk's own: `connection_received`, `start_training`, `fl_update`, `end_session`. Rank 1.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.errors import WireError

PROTOCOL: Literal[2] = 2
NAMESPACE = "/fl"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NodeId = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Run = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Of rounds and attempts: what a database and a file's name can hold."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Reason = Annotated[str, Field(max_length=2000)]
UPDATE = "update"
"""The phase of a link in which updates are protected and come by the log: between those before and those after."""
PART, PARTS = 256 << 10, 16
"""A letter of a link comes in parts of so many bytes, and in so many at most."""
Sums = dict[Annotated[str, Field(max_length=64)], float]


class Message(BaseModel):
    """A message of the control channel; its `event` is the name it travels under."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    event: ClassVar[str]
    v: Literal[2] = PROTOCOL

    @classmethod
    def read(cls, payload: Any) -> Self:
        """Check what the other side sent.

        Raises:
            WireError: it is no such message, or one of another protocol version.
        """
        if isinstance(payload, dict) and payload.get("v", PROTOCOL) != PROTOCOL:
            raise WireError(
                f"'{cls.event}' of protocol version {payload['v']}: this side speaks {PROTOCOL}; upgrade the older one"
            )
        try:
            return cls.model_validate_json(json.dumps(payload))
        except (ValidationError, TypeError, ValueError, RecursionError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            raise WireError(f"no '{cls.event}' message: {'.'.join(map(str, first['loc']))} {first['msg']}") from error

    def payload(self) -> dict[str, Any]:
        """Return the message as plain values."""
        return self.model_dump(mode="json")


class Connect(Message):
    """Node → server, in the handshake: who it is, signed over the server's challenge, the run and the plan it read."""

    event = "connect"
    name: Name
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    plan: Digest
    challenge: Annotated[str, Field(pattern=r"^[0-9a-f]{112}$")]
    signature: Signature = "0" * 128
    proof: Signature | Literal[""] = ""

    def signed(self, run: str) -> bytes:
        """The bytes that the signature covers."""
        # `proof` is the same text signed by the token, where a node comes for the first time
        return f"atoll connect {PROTOCOL} {run} {self.plan} {self.name} {self.key} {self.challenge}".encode()


class Head(BaseModel):
    """How far the run's record has come, signed by the server: see `chain`. What is acknowledged is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    number: Count
    digest: Digest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class ConnectionReceived(Message):
    """Server → node: you are in; this is the run, the server's own key, and the last round that you are held out of (or 0)."""

    event = "connection_received"
    run: Run
    plan: Digest
    rounds: Count
    round: Count
    held_out: Count = 0
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    head: Head | None = None


class StartTraining(Message):
    """Server → node: fetch this model, train it, and append your update before the deadline (seconds from now).

    `counted` is the node's last update in this run that became part of a model: what it remembers goes with that one.
    """

    event = "start_training"
    run: Run
    round: Count
    attempt: Count
    model: Digest
    deadline: float
    counted: Digest | None = None


class FlUpdate(Message):
    """Node → server: I have appended my update; it is durable in the log."""

    event = "fl_update"
    run: Run
    round: Count
    attempt: Count
    digest: Digest


class Letter(Message):
    """Both ways: a part of what the plan's link says in a phase of a round's try; `body` is base64."""

    event = "link"
    run: Run
    round: Count
    attempt: Count
    phase: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    part: Annotated[int, Field(ge=0, lt=PARTS)] = 0
    parts: Annotated[int, Field(ge=1, le=PARTS)] = 1
    body: Annotated[str, Field(max_length=4 * (PART // 3 + 1))]


class Verdict(Message):
    """Server → node: your update counts, or it doesn't and this is why."""

    event = "verdict"
    run: Run
    round: Count
    attempt: Count
    digest: Digest
    accepted: bool
    reason: Reason = ""
    head: Head | None = None


class Slowed(Message):
    """Server → node: you say more than a node may; the rest is read later."""

    event = "slowed"
    run: Run
    reason: Reason


class Decline(Message):
    """Node → server: nothing will come from me in this round, and this is why."""

    event = "decline"
    run: Run
    round: Count
    attempt: Count
    reason: Reason


class EndSession(Message):
    """Server → node: the run is over; this is its final model (None where there is none). `counted` as in `StartTraining`."""

    event = "end_session"
    run: Run
    rounds: Count
    model: Digest | None
    outcome: Literal["completed", "gave_up", "stopped"]
    reason: Reason = ""
    counted: Digest | None = None
    head: Head | None = None


class SessionEnded(Message):
    """Node → server: I have taken the final model, and this is how it does on my rows (sums)."""

    event = "session_ended"
    run: Run
    metrics: Sums
