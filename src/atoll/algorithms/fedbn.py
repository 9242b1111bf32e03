"""FedBN: normalisation stays with its node, for features that look different everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.fedper import fedper

NORMALISATION = (
    "*batch_norm*",
    "*BatchNorm*",
    "*batchnorm*",
    "*bn[0-9]*",
    "*.bn.*",
    "*running_mean",
    "*running_var",
    "*num_batches_tracked",
)


def fedbn(personal: Sequence[str] = NORMALISATION, *, weighted: bool = True) -> Algorithm:
    """Average all arrays but those of batch norm: scale, shift, and statistics.

    Args:
        personal: names of these arrays, with `*` and `?`. The default knows Keras' own names and the usual ones in PyTorch;
            modules of a PyTorch `Sequential` are numbers, which nobody can guess.
        weighted: by rows; else each node has one voice.

    Raises:
        PlanError: as `fedper`.

    Source: Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", Algorithm 1.
    """
    return fedper(personal, weighted=weighted)
