"""Digits out of an update: a plain one gives them away, a masked one and one with noise don't; by the example's own attacks."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradient-inversion"
SIZES, ROWS, NODES, STEPS = [784, 100, 10], 8, 5, 150
NOISE_OR_LESS = 0.3
"""The most similar of eight other digits is about as similar as 0.55."""


@pytest.fixture(scope="module")
def attack():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        import attack
        import seen

        yield attack, seen
    for name in ("attack", "seen"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def happened(attack, data):
    """A round on MNIST: five nodes of eight pictures each, one step of SGD."""
    _, seen = attack
    count = NODES * ROWS
    images, labels = (data / "mnist" / f"train-{kind}.gz" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    with gzip.open(images) as pictures, gzip.open(labels) as digits:
        x = np.frombuffer(pictures.read(16 + 784 * count), np.uint8, offset=16).reshape(-1, 784) / np.float32(255)
        y = np.frombuffer(digits.read(8 + count), np.uint8, offset=8).astype(np.int64)
    return seen.trained(SIZES, [(x[at : at + ROWS], y[at : at + ROWS]) for at in range(0, count, ROWS)]), x[:ROWS], x[ROWS:]


def test_a_plain_update_of_eight_digits_gives_them_away(attack, happened):
    attack, seen = attack
    passed, true, others = happened
    model, update = passed.model.arrays, passed.updates[0].arrays
    exact = attack.by_units(update)
    found = attack.by_matching(model, update, SIZES, ROWS, STEPS)
    assert np.mean(np.array(attack.best(exact, true)) > 0.95) >= 0.75
    assert np.mean(attack.best(found, true)) > np.mean(attack.best(others, true)) + 0.1  # nearer than any of 32 other digits
    assert seen.psnr(attack.nearest(found, true), true) > 14


def test_a_masked_update_gives_noise_and_the_mean_is_no_picture_of_the_nodes(attack, happened):
    attack, seen = attack
    passed, true, _ = happened
    hidden, mean = seen.masked(passed)
    expected = sum(update.values for update in passed.updates) / NODES
    np.testing.assert_allclose(mean.values, expected, atol=1e-4)  # a secure sum it is
    assert len(attack.by_units(hidden.arrays)) == 0
    assert np.mean(attack.best(attack.by_matching(passed.model.arrays, hidden.arrays, SIZES, ROWS, STEPS), true)) < NOISE_OR_LESS


@pytest.mark.parametrize(("multiplier", "least", "most"), [(0.0, 0.8, 1.0), (1.0, -1.0, NOISE_OR_LESS)])
def test_noise_ends_what_a_clip_alone_does_not(attack, happened, multiplier, least, most):
    attack, seen = attack
    passed, true, _ = happened
    told = seen.noised(passed.updates[0], multiplier).arrays
    found = attack.best(attack.by_matching(passed.model.arrays, told, SIZES, ROWS, STEPS), true)
    assert least < np.mean(found) <= most
