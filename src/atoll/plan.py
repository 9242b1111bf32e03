"""The plan: what everyone agreed to. Immutable, known by the SHA-256 of its canonical JSON.

Enters: one TOML file (and the model file it names, which becomes part of the plan). Leaves: a `Plan`,
the same on the server, on every node and in a simulation. Rank 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from atoll.columns import Columns
from atoll.errors import PlanError
from atoll.guards import Privacy
from atoll.metrics import ALWAYS, KNOWN, meant
from atoll.sections import Fraction, Seconds, Section, mistake, seconds
from atoll.stages import COMMON, Compression, Said
from atoll.stopping import Stopping
from atoll.training import Training

_NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
MODEL_KINDS = ("logistic", "keras", "sklearn", "torch", "jax", "trees")


class About(Section):
    """`[plan]`: name, length and seed of a run."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: NonNegativeInt = 0


class Model(Section):
    """`[model]`: one kind of model, and how it is judged."""

    logistic: bool = False
    keras: dict[str, Any] | None = None
    sklearn: str | None = None
    torch: str | None = None
    jax: str | None = None
    trees: str | None = None
    inputs: PositiveInt | None = None
    classes: tuple[int, ...] = (0, 1)
    loss: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    range: tuple[float, float] | None = None

    @property
    def kind(self) -> str:
        """Which learner it is: one of `MODEL_KINDS`."""
        return next(kind for kind in MODEL_KINDS if getattr(self, kind))

    @property
    def known_metrics(self) -> tuple[str, ...]:
        """The well-known metrics that it names: of `atoll.metrics.KNOWN`."""
        return tuple(name for name in self.metrics if ":" not in name)

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """The functions that it names as metrics."""
        return tuple(name for name in self.metrics if ":" in name)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that it names, each as "package.module:function"."""
        return tuple(name for name in (self.torch, self.jax, *self.own_metrics) if name)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in MODEL_KINDS if getattr(self, kind)]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"exactly one of {', '.join(MODEL_KINDS)} names the model; {said}")
        if self.keras and not self.loss:
            raise ValueError('a Keras model needs loss, for instance loss = "binary_crossentropy"')
        for name in self.functions:
            if not _NAMED.fullmatch(name):
                raise ValueError(f"'{name}' names no function; it looks like \"package.module:function\"")
        for name in self.known_metrics:
            if name not in KNOWN:
                mend = 'a function of your own is "package.module:function"'
                raise ValueError(f"metrics: '{name}' is not known; {meant(name)} ({mend})")
        if self.range and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError("range: is two numbers between which the targets lie, the lower one first")
        if list(self.classes) != sorted(set(self.classes)) or len(self.classes) < 2:
            raise ValueError("classes are at least two different labels in rising order")
        return self


class Aggregation(Section):
    """`[aggregation]`: the algorithm's name and its options."""

    rule: str = "fedavg"
    options: dict[str, Any] = Field(default_factory=dict)


class Cohort(Section):
    """`[cohort]`: who is asked in a round, and when it ends: quorum + grace, or `buffer` updates; or else the deadline.

    With `draw = "poisson"` each node that is there is asked with the chance `fraction`, drawn in secret; a round may then close
    with any number of updates, even none: `minimum` says how many are there before nodes are drawn.
    """

    minimum: PositiveInt = 2
    fraction: Fraction = 1.0
    deadline: Seconds = 600.0
    quorum: Fraction = 0.8
    grace: Annotated[float, Field(ge=0), BeforeValidator(seconds)] = 30.0
    cycle: PositiveInt | None = None
    buffer: PositiveInt | None = None
    draw: Literal["lot", "poisson"] = "lot"
    turns: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _one_a_round(self) -> Self:
        if self.cycle and (self.minimum != 1 or self.fraction != 1):
            raise ValueError("with cycle one node trains in a round: minimum must be 1, and fraction is left out")
        return self

    @model_validator(mode="after")
    def _each_for_itself(self) -> Self:
        if self.draw == "poisson" and (self.cycle or self.buffer):
            raise ValueError('draw = "poisson" asks each node with the chance that fraction says: leave cycle and buffer out')
        if self.turns and (self.cycle or self.buffer or self.draw == "poisson" or self.fraction != 1):
            raise ValueError("with turns each node is asked once in so many rounds: leave fraction, draw, cycle and buffer out")
        return self

    @model_validator(mode="after")
    def _holds_enough(self) -> Self:
        if self.buffer and self.cycle:
            raise ValueError("cycle and buffer exclude each other: with cycle one update makes each model; leave one out")
        if self.buffer and self.buffer < self.minimum:
            raise ValueError(
                f"a round closes with buffer = {self.buffer} updates, and must not with fewer than minimum = {self.minimum}; "
                "raise buffer, or lower minimum"
            )
        return self


class Checks(Section):
    """`[checks]`: how long an update may be, and how long a node is held out that sends what can't count.

    `norm` is a multiple of what is usual, see `server.offences`, 0 for no bound. After `offences` refused
    updates a node isn't asked for `held_out` rounds.
    """

    norm: Annotated[float, Field(ge=0)] = 10.0
    offences: PositiveInt = 3
    held_out: NonNegativeInt = 10

    @model_validator(mode="after")
    def _no_bound_below_the_median(self) -> Self:
        if 0 < self.norm < 1:
            raise ValueError("norm is 0, for no bound, or at least 1: a smaller one refuses the median update itself")
        return self


class Log(Section):
    """`[log]`: the channel that carries updates; without `kafka` it is the one embedded in the server."""

    kafka: str | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = "atoll."
    topics: Literal["shared", "node"] = "shared"

    @property
    def apart(self) -> bool:
        """Whether each node has a topic of its own, so that a broker can keep others from writing there."""
        return self.topics == "node"

    @property
    def topic(self) -> str:
        """The topic of updates; with `apart` a node's own is this one, a dot and the node's id."""
        return f"{self.prefix}updates"

    @model_validator(mode="after")
    def _has_topics(self) -> Self:
        if self.apart and not self.kafka:
            raise ValueError('topics = "node" is of Kafka: name its brokers with kafka = "host:port", or leave topics out')
        return self


class Plan(Section):
    """What everyone agreed to.

    >>> plan = Plan.of({"plan": {"name": "heart", "rounds": 3}, "model": {"logistic": True, "inputs": 13}})
    >>> plan.plan.rounds, plan.cohort.minimum, len(plan.digest)
    (3, 2, 64)
    """

    plan: About
    model: Model
    data: Columns = Columns()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    cohort: Cohort = Cohort()
    checks: Checks = Checks()
    compression: Compression = Compression()
    privacy: Privacy = Privacy()
    stopping: Stopping = Stopping()
    log: Log = Log()

    @model_validator(mode="after")
    def _sums_securely(self) -> Self:
        if not (guard := self.privacy.sums):
            return self
        if self.cohort.cycle or self.cohort.buffer:
            key = "cycle" if self.cohort.cycle else "buffer"
            raise ValueError(f"privacy.{guard} adds up the updates of one cohort: leave cohort.{key} out")
        if self.cohort.minimum < 3:
            raise ValueError(
                f"privacy.{guard}: of a sum of two, each node knows the other's part; raise cohort.minimum "
                f"to 3 or more (it is {self.cohort.minimum})"
            )
        if (buckets := self.privacy.buckets) and self.smallest_sum < 3:
            raise ValueError(
                f"privacy.buckets: {self.cohort.minimum} nodes in {buckets} buckets are fewer than 3 in some, and each sum hides "
                f"a node among at least two others; raise cohort.minimum to {3 * buckets} or more, or lower buckets"
            )
        if buckets and self.compression.up:
            raise ValueError(
                "compression.up: a robust rule compares whole numbers of buckets, and masks hide what compression leaves of "
                "an update; leave it out"
            )
        if self.cohort.draw == "poisson":
            raise ValueError(
                f'cohort.draw = "poisson" may draw fewer nodes than privacy.{guard} adds up, and a new draw would be '
                "no secret: leave one of them out"
            )
        if wrong := next((one for one in self.compression.up if Said.of(one).name not in COMMON), None):
            raise ValueError(
                f"compression.up: what '{wrong}' makes of an update means something else at each node, and privacy.{guard} only "
                "adds up; take 'randomk:0.1', whose places are the same for all, or leave it out"
            )
        if self.checks.norm not in (0, Checks().norm):
            raise ValueError(
                f"checks.norm looks at the length of each update, and privacy.{guard} hides them; leave it out "
                "(nodes shorten their own: privacy.clip)"
            )
        return self

    @property
    def smallest_sum(self) -> int:
        """How few updates a secure sum may be of: as many as a round, or as a bucket of it."""
        return self.cohort.minimum // (self.privacy.buckets or 1)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "plan") -> Plan:
        """Check plain values and return the plan they make.

        Args:
            values: the tables, as TOML or JSON gives them.
            source: the file's name, for errors.

        Raises:
            PlanError: one line with source, key, what is wrong and the nearest right name.
        """
        try:
            # Through JSON, so that strictness still takes lists for tuples and a copy of it means the same.
            return cls.model_validate_json(json.dumps(values))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ValidationError):
                raise PlanError(f"{source}: {mistake(error, cls)}") from None
            raise PlanError(f"{source}: {error}; a plan holds text, numbers, true or false, lists and tables") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a TOML file; a Keras model named in it is read from beside it and becomes part of it.

        A plan as `to_json` writes it, in a file that ends in `.json`, is read as well.

        Raises:
            PlanError: as `of`; or a file is missing or no TOML.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                return cls.from_json(text, source=str(path))
            values = tomllib.loads(text)
        except OSError as error:
            raise PlanError(f"{path}: can't be read ({error.strerror}); `atoll new DIR` writes a plan to start from") from error
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, and what its reader lets through
            raise PlanError(f"{path}: no TOML: {error}") from error
        model = values.get("model")
        if isinstance(model, dict) and isinstance(model.get("keras"), str):
            model["keras"] = _read_json(path, model["keras"])
        return cls.of(values, source=str(path))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "plan") -> Plan:
        """Read a plan as another side sent or stored it.

        Raises:
            PlanError: it is none.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source}: no JSON: {error}") from error
        return cls.of(values if isinstance(values, dict) else {}, source)

    def to_json(self) -> str:
        """Return the canonical JSON: equal plans give equal text, whatever order their files had.

        Only what differs from the defaults is in it: a key that a later version adds changes no plan that doesn't use it.
        """
        return json.dumps(_written(self), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the canonical JSON, as hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes of the target: as `data.classes` numbers them, or as `model.classes` says."""
        return tuple(range(len(self.data.classes))) if self.data.classes else self.model.classes

    @model_validator(mode="after")
    def _foretells_by_a_network(self) -> Self:
        if self.data.foretold and self.model.kind not in ("jax", "keras"):
            raise ValueError(
                f"data.target is its own feature, so each place has a target; a '{self.model.kind}' model takes one a row"
            )
        return self

    @model_validator(mode="after")
    def _takes_gaps(self) -> Self:
        if self.data.incomplete == "keep" and self.model.kind != "trees":
            raise ValueError(
                'data.incomplete = "keep" leaves gaps in rows, which trees alone can take, and no '
                f"'{self.model.kind}' model: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_it_watches(self) -> Self:
        watched, asked = self.stopping.metric, self.model.metrics
        if self.stopping.better is None and watched in KNOWN and watched not in (*ALWAYS, *asked):
            mend = f'add metrics = ["{watched}"] to [model]'
            raise ValueError(f"stopping.metric: '{watched}' is measured only where model.metrics names it: {mend}")
        if self.stopping.better and watched in asked:
            raise ValueError(f"stopping.better is for a metric of your own; which way is better for {watched} is known")
        return self

    @property
    def inputs(self) -> int | None:
        """How many numbers the model takes a row: from the features, or as `model.inputs` says."""
        return self.data.width or self.model.inputs

    def with_(self, **sections: Mapping[str, Any]) -> Plan:
        """Return a copy with some keys of some sections changed, checked like any plan.

        >>> plan = Plan.of({"plan": {"name": "heart", "rounds": 3}, "model": {"logistic": True, "inputs": 13}})
        >>> plan.with_(plan={"rounds": 5}).plan.rounds
        5
        """
        values = self.model_dump(mode="json")
        return Plan.of({**values, **{name: {**values.get(name, {}), **changed} for name, changed in sections.items()}})


def _written(section: BaseModel) -> dict[str, Any]:
    """What a section says beyond its defaults, as plain values."""
    plain, written = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.get_default(call_default_factory=True):
            written[name] = _written(value) if isinstance(value, BaseModel) else plain[name]
    return written


def _read_json(plan: Path, name: str) -> object:
    path = plan.parent / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{plan}: model.keras: {path} can't be read ({error.strerror}); write it with model.to_json()") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{plan}: model.keras: {path} is no JSON ({error}); write it with model.to_json()") from error
