"""What a plan would take from a node: as facts, and in words for whoever has to agree to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from atoll.cli.show import size
from atoll.errors import AtollError
from atoll.plan import Plan
from atoll.stages import CHOICES, STAGES, Said
from atoll.vector import Layouts, layouts_of

TRIES = 3
"""How often a round is tried, at most; each waits and works for no longer than the plan's deadline."""
_OVERHEAD = 1000
"""About how many bytes a protected or plain update has beside its numbers."""
_STAGES = {
    "bfloat16": "each number in 2 bytes",
    "8bit": "each number in 8 bits, rounded up or down by chance",
    "4bit": "each number in 4 bits, rounded up or down by chance",
    "rotate": "all numbers spread over each other",
    "topk": "only the largest {:g} % of the numbers",
    "randomk": "only {:g} % of the numbers, at places drawn for all nodes",
    "powersgd": "each matrix as two thin ones, of rank {:g}",
}
"""What becomes of numbers on their way, in words."""


def taken(plan: Plan, allow: Collection[str] = ()) -> dict[str, Any]:
    """Return what a plan would take from a node, as plain values.

    Args:
        plan: the plan.
        allow: functions of this machine that may run, so that a model which they make can be measured.
    """
    from atoll.node.policy import guards_of
    from atoll.privacy.dp.account import account

    spending = account(plan)
    data, rounds, once = plan.data, plan.plan.rounds, plan.training
    size_of, why = _size(plan, allow)
    return {
        "name": plan.plan.name,
        "digest": plan.digest,
        "columns": [*(data.features or ()), *filter(None, (data.target, data.split))],
        "target": data.target,
        "split": data.split,
        "names_columns": data.columns is not None,
        "pictures": list(data.image) if data.image else None,
        "model": {"kind": plan.model.kind, **size_of, "unknown": why},
        "compression": {"up": list(plan.compression.up), "down": list(plan.compression.down)},
        "rule": plan.aggregation.rule,
        "training": {"epochs": None if once.steps else once.epochs or 1, "steps": once.steps, "batch_size": once.batch_size},
        "rounds": rounds,
        "updates_at_most": rounds * TRIES,
        "seconds_at_most": rounds * TRIES * 2 * plan.cohort.deadline,
        "minimum_cohort": plan.cohort.minimum,
        "buckets": plan.privacy.buckets,
        "smallest_sum": plan.smallest_sum,
        "guards": sorted(guards_of(plan)),
        "epsilon": (spending.spent(rounds), spending.delta) if spending else None,
        "noise": plan.privacy.mechanism.replace("_", " "),
        "unit": spending.unit if spending else None,
        "functions": list(plan.model.functions),
        "kafka": plan.log.kafka,
        "updates_by_name": not guards_of(plan),
    }


def _size(plan: Plan, allow: Collection[str]) -> tuple[dict[str, Any], str | None]:
    """Return how large model and update are, or why that can't be known here."""
    from atoll import algorithms, compression, learners, method
    from atoll.privacy.choose import protected

    try:
        learner = learners.build(plan, allow)
        algorithm = method.find(plan, learner)
        updates = algorithm.updates(learner.layouts)
        pressed = compression.find(plan, updates, sums=algorithms.adds(algorithm)).layouts(updates)
        small = protected(plan, pressed, pressed)[1]
        model = layouts_of(algorithm.brief(algorithm.init(learner.initial(0))))
    except AtollError as error:
        unknown = ("numbers", "bytes", "update", "whole_bytes", "update_bytes", "model_bytes")
        return dict.fromkeys(unknown), str(error)
    return {
        "numbers": sum(layout.size for layout in learner.layouts.values()),
        "bytes": _bytes(learner.layouts),
        "update": {name: layout.size for name, layout in updates.items()},
        "whole_bytes": _bytes(protected(plan, updates, updates)[1]) + _OVERHEAD,
        "update_bytes": _bytes(small) + _OVERHEAD,
        "model_bytes": _bytes(compression.down(plan, learner.layouts).press.layouts(model)) + _OVERHEAD,
    }, None


def _bytes(layouts: Layouts) -> int:
    return sum(layout.nbytes for layout in layouts.values())


def words(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say in plain words what `taken` found: headings and paragraphs."""
    return [
        ("The plan", f"{found['name']}. Change a letter of it, and it is another plan, with another digest."),
        ("Its digest", found["digest"]),
        ("It reads", _read(found)),
        ("It trains", _trained(found)),
        ("What leaves", _leaving(found)),
        ("Made smaller", _pressed(found)),
        ("How often", _often(found)),
        ("Protected by", _protected(found)),
        ("ε", _noise(found)),
        ("Who sees it", _seen(found)),
        ("It runs here", _functions(found)),
        ("It leaves here", _kept()),
    ]


def _read(found: Mapping[str, Any]) -> str:
    if found["pictures"]:
        height, width, channels = found["pictures"]
        return (
            f"pictures, each made {height} × {width} × {channels} numbers, and their folders' names. They stay on this machine."
        )
    if not found["columns"]:
        return "whole arrays: whatever you give the node; the plan names no columns. The rows stay on this machine."
    features = [name for name in found["columns"] if name not in (found["target"], found["split"])]
    said = f"of each row the columns {', '.join(features)}; and {found['target']}, which the model learns to tell"
    said += f"; and {found['split']}, which says what only judges" if found["split"] else ""
    said += ". No other column is used. The rows stay on this machine."
    if found["names_columns"]:
        said += " Careful: the plan itself says which column of a file has which name; compare that with your files."
    return said


def _trained(found: Mapping[str, Any]) -> str:
    model, training = found["model"], found["training"]
    if model["numbers"] is None:
        what = f"a model ({model['kind']}) whose size isn't known here ({model['unknown']})"
    else:
        what = f"a model ({model['kind']}) of {model['numbers']:,} numbers, {size(model['bytes'])}"
    if training["steps"]:
        often = f"in each round on {training['steps']:,} batches of {training['batch_size']} of your rows"
    else:
        times = "once" if training["epochs"] == 1 else f"{training['epochs']} times"
        often = f"in each round {times} over your rows"
    return f"{what}, by the method {found['rule']}, {often}."


def _leaving(found: Mapping[str, Any]) -> str:
    update = found["model"]["update"]
    if update is None:
        what = "how training changed the model's numbers"
    else:
        groups = ", ".join(f"{count:,} numbers '{name}'" for name, count in update.items())
        what = f"about {size(found['model']['update_bytes'])} a round: how training changed the model ({groups})"
    figures = f"; the results of {', '.join(found['functions'])}" if found["functions"] else ""
    sums = f"how many rows you have; and sums over your rows, such as the model's loss and how many it gets right{figures}"
    if found["noise"]:
        beside = "Nothing of how the model does on your rows, and no figures"
    elif found["guards"]:
        beside = f"Under the same guard {sums}"
    else:
        beside = f"Beside it {sums}. At the end, such sums for the final model"
    return f"{what}. {beside}. The node's name and its key's public half. Never a row."


def _pressed(found: Mapping[str, Any]) -> str:
    """Say what makes updates and models smaller, and how much of them is left."""
    stages, model = found["compression"], found["model"]
    up, down = _staged(stages["up"], "here, and a later update"), _staged(stages["down"], "at the server, and a later model")
    if model["numbers"] is not None:
        up += f"; about {size(model['update_bytes'])} a round"
        up += f", in place of {size(model['whole_bytes'])}" if stages["up"] else ""
        down += f"; about {size(model['model_bytes'])} a round"
        down += f", or {size(model['bytes'])} whole where the one before isn't here" if _leaves(stages["down"]) else ""
    return f"updates: {up}. Models on their way here: {down}."


def _staged(stages: Sequence[str], kept: str) -> str:
    said = [(one.name, 100 * one.value if STAGES[one.name] == "fraction" else one.value) for one in map(Said.of, stages)]
    left = f"; what is left out is kept {kept} brings it" if _leaves(stages) else ""
    return (", then ".join(_STAGES[name].format(value) for name, value in said) or "as they are") + left


def _leaves(stages: Sequence[str]) -> bool:
    return any(Said.of(one).name in CHOICES for one in stages)


def _often(found: Mapping[str, Any]) -> str:
    return (
        f"{found['rounds']:,} rounds, an update in each; a round that fails is tried up to {TRIES} times, so that at most "
        f"{found['updates_at_most']:,} updates leave. By the plan a run takes at most {_duration(found['seconds_at_most'])}; "
        f"only your own policy limits how many runs there are (updates), and when (hours)."
    )


def _duration(seconds: float) -> str:
    """Say a duration in the unit that fits.

    >>> _duration(90), _duration(18_000), _duration(1e6)
    ('2 minutes', '5 hours', '12 days')
    """
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds / 60))} minutes"


def _protected(found: Mapping[str, Any]) -> str:
    said = {
        "secure_aggregation": f"secure aggregation: the server learns the sum of at least {found['smallest_sum']} nodes' "
        f"updates, and no single one. {_split(found)}Against a server that lies it holds where you pin a roster.",
        "encryption": "homomorphic encryption: the server adds up what it can't read; the nodes decrypt the sum. "
        "A node that works with the server opens every update.",
    }
    if found["noise"] in ("local noise", "example noise"):
        return "noise that this node adds itself, before anything leaves: see ε."
    if not found["guards"]:
        return (
            "nothing but the way it is sent: the server reads your update. What can be got out of one: "
            "docs/how-to/gradient-inversion.md."
        )
    return " ".join(said[guard] for guard in found["guards"])


def _split(found: Mapping[str, Any]) -> str:
    """Say what buckets cost: the same nodes hide less in smaller sums."""
    if found["buckets"] is None:
        return ""
    bound = ", as far as the noise in each sum lets it: see ε" if found["noise"] else ""
    few, all_ = found["smallest_sum"] - 1, found["minimum_cohort"] - 1
    return (
        f"It learns up to {found['buckets']} such sums a round, one for each bucket of nodes, where one sum of all would tell it "
        f"less: yours hides among as few as {few} others, not {all_}, and each round draws other ones, so that over many rounds "
        f"a node whose updates stay much alike can be made out{bound}. "
    )


def _noise(found: Mapping[str, Any]) -> str:
    if found["epsilon"] is None and found["noise"]:
        return f"{found['noise']}: ε follows from how many rows you have; `atoll privacy PLAN` says it for a number of rows."
    if found["epsilon"] is None:
        return "no noise is added: nothing bounds what updates, or their sums, tell of a row."
    spent, delta = found["epsilon"]
    again = " A try of a round that is repeated costs once more." if found["noise"] in ("local noise", "example noise") else ""
    return (
        f"{found['noise']}: what the run gives out tells of {found['unit']} no more than ε {spent:.3g} at δ {delta:g}, all "
        f"{found['rounds']} rounds together (`atoll privacy PLAN` says what that stands on).{again}"
    )


def _seen(found: Mapping[str, Any]) -> str:
    if found["guards"]:
        said = "The server's operator: that you take part, when, and the sums. Nobody: your update."
    else:
        figures = "" if found["noise"] else ", and its figures"
        said = f"The server's operator, and whoever reads its store: each of your updates with your name{figures}."
    if found["kafka"]:
        said += f" The operator of the Kafka at {found['kafka']}: what the server's operator sees of updates."
    return f"{said} All who take part, and whoever is given it: each round's model, and the last one."


def _functions(found: Mapping[str, Any]) -> str:
    if not found["functions"]:
        return "no function of this machine; only what Atoll itself brings."
    names = ", ".join(found["functions"])
    return f"{names}: functions of this machine, which see your rows, and only where you allow them (--allow)."


def _kept() -> str:
    return (
        "in the node's directory: its key, the ledger of what left, the update on its way, what the method remembers between "
        "rounds, while it runs large rows in files, and the final model."
    )
