"""The owner's policy: what a node agrees to, whatever a plan asks and whatever its server says.

Enters: a TOML file of the data's owner. Leaves: None, or one line that says what is refused and why. Pure but for reading
the file: the time and what the node knows of a round are arguments.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from zoneinfo import ZoneInfo

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from atoll.errors import PolicyError
from atoll.guards import NOISES
from atoll.plan import Plan
from atoll.sections import Section, mistake, nearest

Guard = Literal["secure_aggregation", "encryption"]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_WEEK: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Words = tuple[str, ...]


class Policy(Section):
    """What the owner of a node's data agrees to; what is left out allows everything. Each key: docs/how-to/data-owner.md."""

    plans: str | Words = "any"
    minimum_cohort: PositiveInt | None = None
    rows: PositiveInt | None = None
    guards: Annotated[tuple[Guard, ...], Field(min_length=1)] | None = None
    roster: Annotated[Words, Field(min_length=3)] | None = None
    noise: Annotated[Words, Field(min_length=1)] | None = None
    epsilon: PositiveFloat | None = None
    epsilon_round: PositiveFloat | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    epochs: PositiveFloat | None = None
    updates: PositiveInt | None = None
    columns: Words | None = None
    header: Words | None = None
    functions: Words | None = None
    brokers: Words | None = None
    hours: str | None = None
    weekdays: Annotated[tuple[Weekday, ...], Field(min_length=1)] | None = None
    time_zone: str | None = None

    @field_validator("plans")
    @classmethod
    def _are_whole(cls, plans: str | Words) -> str | Words:
        if plans not in ("any", "ask") and (isinstance(plans, str) or not all(_hex(one, 64) for one in plans)):
            raise ValueError('is "any", "ask", or a list of whole digests (64 hex digits, as `atoll plan show` gives them)')
        return plans

    @field_validator("roster")
    @classmethod
    def _are_nodes(cls, roster: Words | None) -> Words | None:
        if strange := next((one for one in roster or () if not _hex(one, 32)), None):
            raise ValueError(f"'{strange}' is no node's id (32 hex digits, as `atoll keys new` shows)")
        return roster

    @field_validator("noise")
    @classmethod
    def _are_kinds(cls, noise: Words | None) -> Words | None:
        if strange := next((one for one in noise or () if one not in NOISES), None):
            raise ValueError(f"'{strange}' is no kind of noise{nearest(strange, NOISES)}")
        return noise

    @field_validator("hours")
    @classmethod
    def _are_two_times(cls, hours: str | None) -> str | None:
        if hours is not None and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", hours, re.ASCII):
            raise ValueError('looks like "22:00-06:00"')
        if hours and len(set(hours.split("-"))) == 1:
            raise ValueError("begins and ends at the same time: leave it out to allow all day")
        return hours

    @field_validator("time_zone")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        try:
            return name and ZoneInfo(name).key
        except (KeyError, OSError, ValueError):
            raise ValueError("no time zone that this machine knows; it looks like 'Europe/Berlin' (or install tzdata)") from None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.time_zone and not (self.hours or self.weekdays):
            raise ValueError("time_zone goes with hours or weekdays")
        if (self.epsilon or self.epsilon_round or self.delta) and not self.noise:
            raise ValueError(
                "epsilon, epsilon_round and delta go with noise, which names the kinds that count: of central_noise only the "
                "server knows that it was added"
            )
        if self.header and not self.columns:
            raise ValueError("header goes with columns: it says which column is which in files without a header")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "policy") -> Policy:
        """Check plain values and return the policy they make.

        Raises:
            PolicyError: one line with source, key, what is wrong and the nearest right name.
        """
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise PolicyError(f"{source}: {mistake(error, cls)}") from None
        except (TypeError, ValueError) as error:
            raise PolicyError(f"{source}: {error}; a policy holds text, numbers and lists of them") from None

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy from a TOML file.

        Raises:
            PolicyError: as `of`; or the file is missing or no TOML.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"{path}: can't be read ({error.strerror}); `atoll policy new FILE` writes one") from error
        except ValueError as error:
            raise PolicyError(f"{path}: no TOML: {error}") from error
        return cls.of(values, str(path))


def _hex(text: str, length: int) -> bool:
    return len(text) == length and set(text) <= set("0123456789abcdef")


class Asked(NamedTuple):
    """What a node knows of the round that it is asked for.

    Args:
        round: as the server says.
        rows, judged: how many the node would train on, and judge the model by.
        left: how many updates left the node, of whatever plan, besides the one that is asked for.
        epsilon: of all that ever left, the one that is asked for included; None where no noise bounds that.
        epsilon_round: of this one alone.
    """

    round: int
    rows: int
    judged: int
    left: int
    epsilon: float | None = None
    epsilon_round: float | None = None


def refuses(policy: Policy, plan: Plan, asked: Asked | None, now: float) -> str | None:
    """Say why the owner doesn't agree, or None.

    Args:
        policy: the owner's.
        plan: what the server runs.
        asked: the round; None asks of the plan alone, whatever comes.
        now: seconds since 1970.
    """
    return next(_against_plan(policy, plan), None) or (next(_against_round(policy, plan, asked, now), None) if asked else None)


def _against_plan(policy: Policy, plan: Plan) -> Iterator[str]:
    if isinstance(policy.plans, tuple) and plan.digest not in policy.plans:
        yield f"plans: plan {plan.digest} is not among those that its owner agreed to"
    if policy.minimum_cohort and plan.smallest_sum < policy.minimum_cohort:
        yield f"minimum_cohort: the plan adds up as few as {plan.smallest_sum} updates, it takes {policy.minimum_cohort}"
    if policy.minimum_cohort and plan.cohort.draw == "poisson":
        yield "minimum_cohort: the plan draws each node by chance, so that a round may have one update alone"
    guards = guards_of(plan)
    if policy.guards and not guards & set(policy.guards):
        yield f"guards: the plan's updates leave without {' or '.join(policy.guards)}"
    if policy.noise is not None:
        yield from _against_noise(policy, policy.noise, plan)
    if policy.roster is not None:
        yield from _against_roster(policy.roster, plan, guards)
    if policy.columns is not None:
        yield from _against_columns(policy.columns, policy.header, plan)
    if policy.brokers is not None and (
        others := [one for one in (plan.log.kafka or "").split(",") if one.strip() not in policy.brokers]
    ):
        yield f"brokers: the plan sends updates to the Kafka at {', '.join(others)}"
    if policy.functions is not None and (others := [one for one in plan.model.functions if one not in policy.functions]):
        yield f"functions: the plan runs {' and '.join(others)} here"


def _against_noise(policy: Policy, kinds: Words, plan: Plan) -> Iterator[str]:
    noise = plan.privacy.noise
    if noise is None or plan.privacy.mechanism not in kinds:
        yield f"noise: the plan's updates leave without {' or '.join(kinds)}"
    elif policy.delta and noise.delta > policy.delta:
        yield f"delta: the plan's is {noise.delta:g}, at most {policy.delta:g} is allowed"


def _against_roster(roster: Words, plan: Plan, guards: set[str]) -> Iterator[str]:
    if not guards:
        yield "roster: the plan's updates leave one by one, so that a roster means nothing; it needs secure_aggregation"
    strangers = set(plan.privacy.roster or ()) - set(roster)
    if strangers:
        yield f"roster: the plan's has nodes that its owner doesn't know: {', '.join(sorted(strangers))}"


def _against_columns(columns: Words, header: Words | None, plan: Plan) -> Iterator[str]:
    data = plan.data
    if data.features is None:
        yield "columns: the plan names none: it takes whole arrays or pictures"
    others = [name for name in (*(data.features or ()), data.target, data.split) if name and name not in columns]
    if others:
        yield f"columns: the plan reads {', '.join(dict.fromkeys(others))}; allowed: {', '.join(columns)}"
    if data.columns is not None and data.columns != header:  # else a plan could call any column by an allowed one's name
        yield f"header: the plan gives files' columns names of its own ({', '.join(data.columns[:20])})"


def _against_round(policy: Policy, plan: Plan, asked: Asked, now: float) -> Iterator[str]:
    if not 1 <= asked.round <= plan.plan.rounds:
        yield f"the plan has rounds 1 to {plan.plan.rounds}, and none with number {asked.round}"
    if policy.updates and asked.left >= policy.updates:
        yield f"updates: {asked.left} left this node already, {policy.updates} may"
    for key, spent, most in (
        ("epsilon_round", asked.epsilon_round, policy.epsilon_round),
        ("epsilon", asked.epsilon, policy.epsilon),
    ):
        if most and (spent is None or spent > most):
            said = "nothing bounds it" if spent is None else f"it comes to {spent:.4g}"
            yield f"{key}: {said} with this round's update, at most {most:g} is allowed"
    if policy.rows and min(_used(plan, asked.rows), asked.judged) < policy.rows:
        yield f"rows: fewer than {policy.rows} would be in the update or its figures, and each could be told from it"
    if policy.epochs and (epochs := _passes(plan, asked.rows)) > policy.epochs:
        yield f"epochs: the plan goes over these rows {epochs:.4g} times a round, {policy.epochs:.4g} are allowed"
    if closed := _closed(policy, now):
        yield closed


def _used(plan: Plan, rows: int) -> int:
    """Return how many of the rows a round's mini-batches hold."""
    return min(rows, plan.training.steps * plan.training.batch_size) if plan.training.steps else rows


def _passes(plan: Plan, rows: int) -> float:
    """Return how often a round goes over the rows: what [training] says, and what the method does beside it."""
    rule, options, once = plan.aggregation.rule, plan.aggregation.options, plan.training
    drawn = plan.privacy.example_noise and plan.privacy.example_noise.rows  # as if there were so many
    a_pass = max(1, -(-(drawn or rows) // once.batch_size))
    steps = once.steps or (once.epochs or 1) * a_pass
    passes = float(steps) if plan.model.sklearn == "LogisticRegression" else steps / a_pass  # its solver takes all rows a step
    more = {
        "scaffold": 1.0 if options.get("option") == "I" else 0.0,
        "mime_lite": 1.0,
        "ditto": passes,
        "apfl": passes,
        "finetune": options.get("steps", steps) / a_pass,
    }
    return 1.0 if rule in ("fedsgd", "newton") else passes + more.get(rule, 0.0)


def _closed(policy: Policy, now: float) -> str | None:
    """Say that it is not the time; a night belongs to the day on which it begins."""
    here = datetime.fromtimestamp(now, UTC).astimezone(ZoneInfo(policy.time_zone) if policy.time_zone else None)
    day, at = here.weekday(), here.time()
    if policy.hours:
        begin, end = (time.fromisoformat(word) for word in policy.hours.split("-"))
        if end <= at < begin or (begin < end and not begin <= at < end):
            return f"hours: it is {here:%H:%M}, and this node works {policy.hours}"
        if at < begin:
            day = (here - timedelta(days=1)).weekday()
    if policy.weekdays and _WEEK[day] not in policy.weekdays:
        return f"weekdays: it is {_WEEK[day]}, and this node works on {', '.join(policy.weekdays)}"
    return None


def guards_of(plan: Plan) -> set[str]:
    """Return which guards hide a single update from the server, under a plan."""
    return {plan.privacy.sums} - {""}


def guard_said(plan: Plan) -> str:
    """Say in a few words what protects an update under a plan, for the ledger."""
    guards = [*sorted(guards_of(plan)), *filter(None, [plan.privacy.mechanism])]
    return " and ".join(guard.replace("_", " ") for guard in guards) or "none"
