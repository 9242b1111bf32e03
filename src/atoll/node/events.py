"""What happens to a node (events), and what is to be done about it (commands): plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.messages import EndSession, FlUpdate, StartTraining, Verdict


@dataclass(frozen=True)
class Event:
    """Something that happened, at a time in seconds."""

    now: float


@dataclass(frozen=True)
class Connected(Event):
    """The server has let this node in."""


@dataclass(frozen=True)
class Disconnected(Event):
    """The control channel is gone, or could not be opened."""


@dataclass(frozen=True)
class Asked(Event):
    """The server asks for training."""

    task: StartTraining


@dataclass(frozen=True)
class Said(Event):
    """The server says something to the plan's link, in a phase of a round's try."""

    key: tuple[str, int, int]
    phase: str
    body: bytes


@dataclass(frozen=True)
class Fitted(Event):
    """The model is trained; before it can leave, the link protects it."""

    task: StartTraining


@dataclass(frozen=True)
class Trained(Event):
    """An update is made, sealed and kept on disk."""

    task: StartTraining
    digest: str


@dataclass(frozen=True)
class CannotTrain(Event):
    """Training, protecting or sending failed for good in this round."""

    task: StartTraining
    reason: str


@dataclass(frozen=True)
class Appended(Event):
    """The update is durable in the log."""

    task: StartTraining


@dataclass(frozen=True)
class Unanswered(Event):
    """The server didn't give the model, or the log didn't take the update; they may later."""

    task: StartTraining


@dataclass(frozen=True)
class Judged(Event):
    """The server says whether an update counts."""

    verdict: Verdict


@dataclass(frozen=True)
class Told(Event):
    """The server says that the run is over."""

    end: EndSession


@dataclass(frozen=True)
class Taken(Event):
    """The final model is saved, or there is none to save."""


@dataclass(frozen=True)
class NotTaken(Event):
    """The final model could not be fetched; it may be later."""


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class Dial:
    """Open the control channel."""


@dataclass(frozen=True)
class Train:
    """Fetch the model and train."""

    task: StartTraining


@dataclass(frozen=True)
class Answer:
    """Let the link answer what it was told in a phase."""

    task: StartTraining
    phase: str
    body: bytes


@dataclass(frozen=True)
class Protect:
    """Let the link protect what was trained, with what it was told for that."""

    task: StartTraining
    body: bytes


@dataclass(frozen=True)
class Append:
    """Append the kept update to the log, from where it stopped."""

    task: StartTraining


@dataclass(frozen=True)
class Say:
    """Tell the server that the update is in the log."""

    message: FlUpdate


@dataclass(frozen=True)
class Refuse:
    """Tell the server that nothing will come for this task."""

    task: StartTraining
    reason: str


@dataclass(frozen=True)
class Settle:
    """The update is judged: let the kept bytes go."""

    verdict: Verdict


@dataclass(frozen=True)
class Take:
    """Fetch and save the final model."""

    end: EndSession


@dataclass(frozen=True)
class Wake:
    """Send a `Tick` at this time."""

    at: float


@dataclass(frozen=True)
class Leave:
    """Say goodbye and close everything; without an `end` the server stayed away for too long."""

    end: EndSession | None


Command = Dial | Train | Answer | Protect | Append | Say | Refuse | Settle | Take | Wake | Leave
