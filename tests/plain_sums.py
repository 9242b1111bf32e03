"""What a secure run's models must be: each update trained here and written in fixed point, added up with no mask anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll import algorithms, learners, method
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.privacy.choose import known
from atoll.privacy.secagg.update import Code
from atoll.server import transcript
from atoll.vector import Group, Total
from atoll.wire import digest_of, pack

Round = tuple[int, Sequence[str]]
"""How many nodes gave keys, and the names of those whose updates are in."""
BOUNDED = {"secure_aggregation": True, "clip": 2.0, "largest_weight": 100.0}


def models(agreed: Plan, data: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    """Return the digest of the model of each round of a plan with the bounds of `BOUNDED`."""
    guard, learner = agreed.privacy, learners.build(agreed)
    algorithm = method.find(agreed, learner)
    state = algorithm.init(learner.initial(agreed.plan.seed))
    rows = {name: prepare(one, agreed) for name, one in data.items()}
    found = []
    for number, (count, names) in enumerate(rounds, 1):
        assert isinstance(guard.clip, float)
        assert guard.largest_weight
        code = Code(algorithm.updates(learner.layouts), known(agreed), guard.clip, guard.largest_weight, count, guard.bits)
        brief, words = algorithm.brief(state), []
        for name in names:
            _, update = algorithms.work(agreed, algorithm, learner, brief, {}, rows[name], number, name)
            words.append(code.encode(algorithms.voiced(algorithm, update)).groups)
        sums = {
            group: Group(layout, np.sum([one[group].values for one in words], axis=0, dtype=layout.dtype))
            for group, layout in code.masked.items()
        }
        total, _ = code.decode(Total(sums, float(len(names)), len(names), len(data)))
        state = algorithm.step(state, total)
        found.append(digest_of(pack(algorithm.brief(state))))
    return found


def of_history(store: Path, history: Mapping[str, Any]) -> list[Round]:
    """Return who was in each round of a deployed run, by what the server says and keeps."""
    rounds = []
    for row in history["rounds"]:
        kept = transcript.read(transcript.path_of(store, history["run"], row["round"]))
        assert kept
        rounds.append((len(kept.of("keys") or ()), row["answered"]))
    return rounds
