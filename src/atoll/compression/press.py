"""One direction of a plan's compression: all its stages over all groups, and what is left out remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from atoll.compression.bfloat16 import bfloat16
from atoll.compression.powersgd import powersgd
from atoll.compression.quantise import quantise
from atoll.compression.randomk import randomk
from atoll.compression.rotate import rotate
from atoll.compression.stage import Read, Seed, Stage, reader
from atoll.compression.topk import topk
from atoll.errors import LayoutError, PlanError
from atoll.plan import Plan
from atoll.stages import CHOICES, STAGES, Said
from atoll.vector import Flat, Group, Groups, Layout, Layouts, squared

MINE = "compression."
"""What the names of all that a node remembers for compression begin with."""
_LONGEST = 1e36
"""Longer vectors have sums, on the way, that no float32 can hold."""
_WORK = 1 << 17


class Press(NamedTuple):
    """Makes groups small, and opens them: identical on both sides of the wire; without stages it changes nothing.

    Compressed are groups of real numbers that are averaged. What is added up whole (counts, sums), single numbers, and
    `buffers` (a batch norm's variance must not fall below zero by chance) travel as they are.

    On the wire a group's vector keeps its name, and what a stage puts beside it is called `group.stage.what`.

    Args:
        stages: in the order in which numbers go through them.
        seed: the plan's.
        way: `up` or `down`; their draws are apart.
    """

    stages: Sequence[Stage]
    seed: int
    way: Literal["up", "down"] = "up"

    @property
    def biased(self) -> bool:
        """Whether what is left out has to be remembered."""
        return any(stage.biased for stage in self.stages)

    def layouts(self, layouts: Layouts) -> dict[str, Layout]:
        """Return the layouts of groups on the wire."""
        made: dict[str, Layout] = {}
        for name, layout in layouts.items():
            if not self.presses(name, layout):
                made[name] = layout
                continue
            inner, beside = self._shapes(layout)
            made[name] = inner[-1]
            made |= {f"{name}.{stage.name}.{what}": one for stage, found in beside for what, one in found.items()}
        return made

    def presses(self, name: str, layout: Layout) -> bool:
        """Say whether a group is made small, and doesn't travel as it is."""
        averaged = layout.total == "weighted" and layout.dtype in ("float32", "float64")
        return bool(self.stages) and averaged and layout.size > 1 and name != "buffers"

    def whole(self, layouts: Layouts) -> str:
        """Return the name of a stage that is to leave numbers out, and of no group leaves any out; or nothing."""
        found = [self._shapes(layout)[0] for name, layout in layouts.items() if self.presses(name, layout)]
        for place, stage in enumerate(self.stages):
            if stage.biased and all(inner[place + 1].size >= inner[place].size for inner in found):
                return stage.name
        return ""

    def _shapes(self, layout: Layout) -> tuple[list[Layout], list[tuple[Stage, Layouts]]]:
        """Return the layouts of the vector before each stage and after the last, and of what each puts beside it."""
        inner: list[Layout] = [Layout(layout.tensors)]
        beside: list[tuple[Stage, Layouts]] = []
        for stage in self.stages:
            found = stage.shapes(inner[-1])
            inner.append(found.main)
            beside.append((stage, found.beside))
        return inner, beside

    def encode(self, groups: Groups, memory: Groups, round_: int, who: str) -> tuple[dict[str, Group], dict[str, Group]]:
        """Make groups small.

        Args:
            groups: what is to travel.
            memory: what was remembered (as this returns it; empty at first).
            round_: draws are this round's.
            who: whose own draws these are: a node's name.

        Returns:
            The groups as they travel, and what is to be remembered once they count: what they left out, by error feedback
            (Karimireddy et al. 2019, Algorithm 1), and what stages begin with the next time.

        Raises:
            LayoutError: numbers so large that sums of them are none.
        """
        if not self.stages:
            return dict(groups), {}
        sent: dict[str, Group] = {}
        kept: dict[str, Group] = {}
        rng = np.random.default_rng([*self._common(round_, "own draws"), *_words(who)])
        for name, group in groups.items():
            if not self.presses(name, group.layout):
                sent[name] = group
                continue
            before = memory.get(f"{MINE}{name}")
            whole = group.with_values(group.values + before.values) if before else group
            mine = self._pressed(name, whole, memory, round_, rng)
            sent |= mine[0]
            if self.biased:
                left = _left(whole, self._opened(name, mine[0], group.layout, round_))
                kept |= {f"{MINE}{name}": whole.with_values(left), **mine[1]}
        return sent, kept

    def _pressed(
        self, name: str, whole: Group, memory: Groups, round_: int, rng: np.random.Generator
    ) -> tuple[dict[str, Group], dict[str, Group]]:
        if not squared(whole.values) < _LONGEST**2:
            what = "the update" if self.way == "up" else "the model"
            raise LayoutError(
                f"{what} holds NaN or infinity, or is too long to be compressed; lower training.learning_rate, or look for huge "
                "values"
            )
        vector = Group(Layout(whole.layout.tensors), whole.values.astype(np.float32, copy=False))
        sent: dict[str, Group] = {}
        kept: dict[str, Group] = {}
        for place, stage in enumerate(self.stages):
            prefix = f"{MINE}{name}.{stage.name}."
            mine = {key.removeprefix(prefix): group for key, group in memory.items() if key.startswith(prefix)}
            coded = stage.encode(vector, mine, self._common(round_, name, place), rng)
            vector = coded.main
            sent |= {f"{name}.{stage.name}.{what}": group for what, group in coded.beside.items()}
            kept |= {f"{prefix}{what}": group for what, group in coded.memory.items()}
        return {name: vector, **sent}, kept

    def open(self, groups: Groups, layouts: Layouts, round_: int) -> dict[str, Read]:
        """Return how to read each group, in the dtype that its layout says.

        Args:
            groups: as they travelled, in the layouts that `layouts` gives.
            layouts: what they were before.
            round_: the one that they were made in.

        Raises:
            WireError: something in them that no encoder makes.
        """
        return {
            name: self._opened(name, groups, layout, round_) if self.presses(name, layout) else reader(groups[name].values)
            for name, layout in layouts.items()
        }

    def _opened(self, name: str, groups: Groups, layout: Layout, round_: int) -> Read:
        inner, beside = self._shapes(layout)
        read = reader(groups[name].values)
        for place in reversed(range(len(self.stages))):
            stage, what = beside[place]
            arrays = {one: groups[f"{name}.{stage.name}.{one}"].values for one in what}
            read = stage.open(inner[place], arrays, read, self._common(round_, name, place))
        return read if layout.dtype == "float32" else _typed(read, layout)

    def decode(self, groups: Groups, layouts: Layouts, round_: int) -> dict[str, Group]:
        """Return groups as they were before, as far as what travelled tells; arguments and errors as for `open`."""
        if not self.stages:
            return dict(groups)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever sent what isn't finite hears it from `vector.check`
            return {
                name: _whole(read, layouts[name]) if self.presses(name, layouts[name]) else groups[name]
                for name, read in self.open(groups, layouts, round_).items()
            }

    def _common(self, round_: int, name: str, place: int = 0) -> Seed:
        return [self.seed, round_, place, *_words(f"compression {self.way} {name}")]


OPEN = Press((), 0)
"""Changes nothing."""


def _words(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def _typed(read: Read, layout: Layout) -> Read:
    return lambda lo, hi: read(lo, hi).astype(layout.dtype)


def _whole(read: Read, layout: Layout) -> Group:
    values = np.empty(layout.size, layout.dtype)
    for lo in range(0, layout.size, _WORK):
        values[lo : lo + _WORK] = read(lo, min(lo + _WORK, layout.size))
    return Group(layout, values)


def _left(whole: Group, opened: Read) -> Flat:
    """Return what is left of a vector without what travels."""
    left = np.empty_like(whole.values)
    for lo in range(0, left.size, _WORK):
        part = whole.values[lo : lo + _WORK]
        np.subtract(part, opened(lo, lo + len(part)), out=left[lo : lo + _WORK])
    return left


_MADE: Mapping[str, Callable[[float], Stage]] = {
    "bfloat16": lambda _: bfloat16(),
    "8bit": lambda _: quantise(8),
    "4bit": lambda _: quantise(4),
    "rotate": lambda _: rotate(),
    "topk": topk,
    "randomk": randomk,
    "powersgd": lambda rank: powersgd(int(rank)),
}


def stages(said: Sequence[str]) -> tuple[Stage, ...]:
    """Return the stages that a plan names.

    Raises:
        ValueError: see `Said.of`.
    """
    return tuple(_MADE[one.name](one.value) for one in map(Said.of, said))


def find(plan: Plan, layouts: Layouts, *, sums: bool) -> Press:
    """Return what makes a plan's updates small.

    Args:
        plan: the plan.
        layouts: of its updates' groups.
        sums: whether its rule adds updates up; else it compares them with each other (robust rules).

    Raises:
        PlanError: the stages don't go together with the rest of the plan.
    """
    said = plan.compression.up
    press = Press(stages(said), plan.plan.seed)
    if press.stages and press.layouts(layouts) == dict(layouts):
        raise PlanError(
            f"compression.up: '{plan.aggregation.rule}' sends nothing that is averaged, and sums must stay exact; leave up out"
        )
    if whole := press.whole(layouts):
        raise PlanError(
            f"compression.up: '{whole}' leaves nothing out of this model's update: its arrays are too small for such a "
            f"{STAGES[whole]}; take a smaller one, or '8bit'"
        )
    wrong = next((one for one in said if Said.of(one).name in CHOICES), None)
    if wrong and plan.privacy.clip is not None:
        raise PlanError(
            f"compression.up: what '{wrong}' leaves out comes on top of a later update, which may be longer then than "
            "privacy.clip; take '8bit', '4bit' or 'bfloat16'"
        )
    if wrong and not sums:
        raise PlanError(
            f"compression.up: '{plan.aggregation.rule}' compares updates with each other, and '{wrong}' leaves numbers out; "
            "take '8bit', '4bit' or 'bfloat16'"
        )
    return press


def parted(memory: Groups) -> tuple[dict[str, Group], dict[str, Group]]:
    """Part what a node remembers into the method's own and what is for compression."""
    mine: Mapping[str, Group] = {name: group for name, group in memory.items() if name.startswith(MINE)}
    return {name: group for name, group in memory.items() if name not in mine}, dict(mine)
