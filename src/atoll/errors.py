"""The errors of Atoll: one small tree; each says what, where and how to mend it, in one line."""

from __future__ import annotations

LONGEST = 1800
"""Characters in an error's sentence; what is longer is cut."""


class AtollError(Exception):
    """The root: a sentence for a person, and where in a run it happened.

    Attributes:
        run, round, node, stage: where it happened; None where it does not apply.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        run: str | None = None,
        round: int | None = None,  # noqa: A002  the field's own word
        node: str | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(message)
        self.run, self.round, self.node, self.stage = run, round, node, stage

    def __str__(self) -> str:
        place = [f"{name} {value}" for name in ("run", "round", "node", "stage") if (value := getattr(self, name)) is not None]
        # The other side may have had its word in it: nothing that a terminal or a database would choke on, and no novel.
        said = "".join(one if one.isprintable() else repr(one)[1:-1] for one in " ".join(super().__str__().split()))
        message = said if len(said) <= LONGEST else f"{said[: LONGEST - 2]} …"
        return f"{message} [{', '.join(place)}]" if place else message


class PlanError(AtollError):
    """A plan that can't be carried out: which key, what is wrong, what would be right."""


class PolicyError(AtollError):
    """What a data's owner doesn't agree to: which line of the policy, what was asked, what would be right."""


class DataError(AtollError):
    """Rows that don't fit the plan: a missing column, a value that is no number, nothing left."""


class LayoutError(AtollError):
    """Arrays whose names, shapes or dtypes are not the agreed ones, or whose values are not finite."""


class WireError(AtollError):
    """Bytes that are no update of this protocol: truncated, altered, unsigned, of another version."""


class RefusedError(AtollError):
    """The other side said no, for good: sending the same again won't help."""


class UnreachableError(AtollError):
    """The other side doesn't answer now: trying again later may help."""


class LogError(AtollError):
    """The update log, or the broker behind it, can't do what was asked."""


class StoreError(AtollError):
    """The store can't be read or written."""


class UnwritableError(StoreError):
    """The store can't be written now, as on a disk that is full or has gone read-only: after the mend it can."""


class AuditError(AtollError):
    """A run's record that was altered, cut or forked: which entry, and how that shows."""


class LearnerError(AtollError):
    """A model that can't be built or trained as the plan says."""


class PrivacyError(AtollError):
    """A guard that can't hold: who sent what it must not, or how few are left; nothing was revealed."""


class GaveUpError(AtollError):
    """A run that stopped before its last round; everything up to there is stored."""

    exit_code = 3
