"""Models on their way to nodes: small files that stand for themselves, or steps from the model that a node has already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from atoll.compression.press import Press, stages
from atoll.errors import PlanError, WireError
from atoll.plan import Plan
from atoll.stages import STAGES
from atoll.vector import Group, Groups, Layouts, layouts_of
from atoll.wire import Buffer, digest_of, layouts_said, pack, unpack


class Down(NamedTuple):
    """How a plan's models get to nodes, said once for both sides; without stages they travel as they are.

    Stages that leave nothing out make a model's file itself small. Of those that do, nodes get a step: R being the model that
    they have, and x the server's own, C(x − R) travels, and R + C(x − R) is the next model, which everybody adds up to the same
    bits. Its file is whole: whoever has another R, or none, takes that. What a step leaves out is a part of x − R the next time.

    Source: Gruntkowska et al. 2023, "EF21-P and Friends", Algorithm 1.
    """

    press: Press

    @property
    def steps(self) -> bool:
        """Whether nodes that have the model before get to the next one by a step."""
        return self.press.biased

    @property
    def small(self) -> bool:
        """Whether a model's file is smaller than what nodes make of it."""
        return bool(self.press.stages) and not self.steps

    def layouts(self, layouts: Layouts) -> Layouts:
        """Return the layouts of the groups in a model's file."""
        return self.press.layouts(layouts) if self.small else layouts

    def next(self, own: Groups, before: Groups | None, round_: int) -> tuple[Groups, Groups | None]:
        """Return the next model, and the step that leads to it, if one does.

        Args:
            own: the server's own model, as the method sends it.
            before: the model that nodes have; None at first.
            round_: the round that made it: draws are its own.

        Raises:
            LayoutError: numbers so large that sums of them are none.
        """
        if before is None or not self.steps:
            return own, None
        apart = {
            name: group.with_values(group.values - before[name].values) if self.press.presses(name, group.layout) else group
            for name, group in own.items()
        }
        step, _ = self.press.encode(apart, {}, round_, "")
        return self.moved(before, step, round_), step

    def moved(self, before: Groups, step: Groups, round_: int) -> dict[str, Group]:
        """Return the model that a step leads to.

        Raises:
            WireError: something in the step that no encoder makes.
        """
        return {
            name: group.with_values(before[name].values + group.values) if self.press.presses(name, group.layout) else group
            for name, group in self.press.decode(step, layouts_of(before), round_).items()
        }

    def file(self, model: Groups) -> tuple[Groups, Mapping[str, str] | None]:
        """Return the groups and the words of a model's file; the same for the same model.

        A small file stands for itself, so nothing is remembered: what it leaves out stays in the server's own model,
        which updates are added to, and so is a part of the next one (error feedback at the server).
        """
        if not self.small:
            return model, None
        return self.press.encode(model, {}, 0, digest_of(pack(model)))[0], {"whole": layouts_said(layouts_of(model))}

    def received(self, file: Groups, layouts: Layouts) -> Groups:
        """Return a model as nodes have it, from the groups in its file; errors as for `Press.open`."""
        return self.press.decode(file, layouts, 0) if self.small else file

    def followed(self, before: Buffer, step: Buffer, layouts: Layouts) -> list[memoryview]:
        """Return the bytes of the file of the model that a step leads to, from those of the step and of the file before.

        Raises:
            WireError, LayoutError: these are no step and no model of the plan.
        """
        moved, words = unpack(step, self.press.layouts(layouts))
        try:
            round_ = int(words["round"])
        except (KeyError, ValueError) as error:
            raise WireError("a step to a model that doesn't say its round") from error
        return pack(self.moved(unpack(before, layouts)[0], moved, abs(round_)))


def down(plan: Plan, layouts: Layouts | None = None) -> Down:
    """Return how a plan's models get to nodes.

    Args:
        plan: the plan.
        layouts: of its model's groups, to be checked against.

    Raises:
        PlanError: the stages don't go together with the model.
    """
    made = Down(Press(stages(plan.compression.down), plan.plan.seed, "down"))
    if layouts is None or not made.press.stages:
        return made
    if made.press.layouts(layouts) == dict(layouts):
        raise PlanError(f"compression.down: a '{plan.model.kind}' model has no numbers that could be less exact; leave down out")
    if whole := made.press.whole(layouts):
        raise PlanError(
            f"compression.down: '{whole}' leaves nothing out of this model: its arrays are too small for such a {STAGES[whole]}; "
            "take a smaller one, or '8bit'"
        )
    return made
