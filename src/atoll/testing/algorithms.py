"""What every federated algorithm holds to, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from atoll.algorithms import Algorithm, Memory, State
from atoll.learner import Data, Learner
from atoll.server.close import Accepted, close
from atoll.training import Training
from atoll.vector import Groups, Update, check, finite, layouts_of
from atoll.wire import encode, pack, pack_whole, unpack, unpack_whole

_MODEL = "0" * 64


def check_algorithm(
    make: Callable[[], Algorithm], learner: Learner, data: Sequence[Data], *, rounds: int = 3, training: Training | None = None
) -> None:
    """Check an algorithm: pure functions, the same bits again, and a state and memories that survive the disk.

    Args:
        make: makes the algorithm; called more than once.
        learner: one that it can use.
        data: what each of some nodes holds.
        rounds: how many to go through.
        training: how nodes fit; two epochs of mini-batches of 16 where nothing is said.

    Raises:
        AssertionError: it breaks one of the rules.
    """
    assert layouts_of(_begin(make(), learner)) == layouts_of(_begin(make(), learner)), "one factory, one state"
    training = training or Training(epochs=2, batch_size=16, learning_rate=0.1)
    first = _run(make(), learner, data, rounds, training, travelling=False)
    again = _run(make(), learner, data, rounds, training, travelling=False)
    assert _same(first, again), "the same again gives the same bits: no randomness but the generator that it is given"
    there = _run(make(), learner, data, rounds, training, travelling=True)
    assert _same(first, there), "state and memories that were stored in between give the same bits"


def _begin(algorithm: Algorithm, learner: Learner) -> State:
    return algorithm.init(learner.initial(5))


def _run(
    algorithm: Algorithm, learner: Learner, data: Sequence[Data], rounds: int, training: Training, *, travelling: bool
) -> State:
    state = _begin(algorithm, learner)
    memories: list[Memory] = [{} for _ in data]
    for round_ in range(1, rounds + 1):
        brief = _brief(algorithm, learner, state)
        bodies = []
        for k, one in enumerate(data):
            rng = np.random.default_rng([round_, k])
            pace = training.pace(len(one.train), round_, rounds)
            before, shown = memories[k], _copied({**memories[k], **brief})
            memories[k], update = algorithm.local(learner, brief, before, one.train, pace, rng)
            assert _same({**before, **brief}, shown), "the received model and the old memory stay as they are"
            assert _finite(memories[k]), "a memory holds finite numbers"
            bodies.append(_sent(algorithm, learner, update))
        given, old = state, _copied(state)
        accepted = [Accepted(f"node-{k}", lambda body=body: body) for k, body in enumerate(bodies)]  # type: ignore[misc]
        state = close(algorithm, given, learner.layouts, _MODEL, accepted, len(data))
        assert _same(given, old), "a step makes a new state and leaves the old one as it is"
        assert layouts_of(state) == layouts_of(old), "a state keeps its layouts"
        assert _finite(state), "a state holds finite numbers"
        if travelling:
            state = unpack(b"".join(pack(state)), layouts_of(state))[0]
            memories = [unpack_whole(b"".join(pack_whole(memory))) if memory else {} for memory in memories]
    return state


def _brief(algorithm: Algorithm, learner: Learner, state: State) -> Groups:
    brief = algorithm.brief(state)
    for name, layout in learner.layouts.items():
        assert name in brief, f"a brief holds the model's own groups; '{name}' is missing"
        assert brief[name].layout == layout, f"a brief holds the model's own groups; '{name}' has another layout"
    return brief


def _sent(algorithm: Algorithm, learner: Learner, update: Update) -> bytes:
    check(update.groups, algorithm.updates(learner.layouts))
    assert update.weight > 0, "an update has a weight"
    return b"".join(encode(update, _MODEL))


def _copied(groups: Groups) -> Groups:
    return {name: group.with_values(group.values.copy()) for name, group in groups.items()}


def _same(ours: Groups, theirs: Groups) -> bool:
    return ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours)


def _finite(groups: Groups) -> bool:
    return all(finite(group.values) for group in groups.values())
