"""Spreading the rows of one table over clients, evenly or unevenly by class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError

_CLASSES = 100
_LEAST = 2
"""So many rows a client has at least, where there are as many: fewer have no deviation to standardise by."""
KINDS = "iid, dirichlet:ALPHA, shards:NUMBER, quantity:ALPHA, shift:DEVIATION, time or key:COLUMN"


def partition(y: NDArray[np.float64], clients: int, how: str, seed: int) -> list[NDArray[np.intp]]:
    """Return the row numbers of each client; every row has one client, every client at least one row.

    `iid` spreads rows evenly. `dirichlet:α` draws for each class which share every client has of it: the smaller α, the
    more uneven. `shards:n` sorts rows by class, cuts them into equal shards and gives every client n of these. `quantity:α`
    draws which share of all rows a client has, of whatever class. `time` takes rows as they come, the first client the
    first. `shift:σ` spreads rows evenly; what it adds to them is `shifted`'s to say.

    Args:
        y: the targets `[rows]`.
        clients: how many.
        how: one of these words.
        seed: of the draw.

    Raises:
        DataError: another word, more clients than rows, or targets that are no classes.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 3 (dirichlet); McMahan et al. 2017, section 3 (shards); Li et al. 2022, "Federated Learning
    on Non-IID Data Silos: An Experimental Study", section 4 (quantity, shift).

    >>> [part.tolist() for part in partition(np.array([0.0, 1.0, 0.0, 1.0]), 2, "shards:1", 0)]
    [[0, 2], [1, 3]]
    """
    if not 1 <= clients <= len(y):
        raise DataError(f"{clients} clients: {len(y)} rows feed 1 to {len(y)}")
    kind, _, said = how.partition(":")
    rng = np.random.default_rng(seed)
    if how == "time":
        return np.array_split(np.arange(len(y)), clients)
    if how == "iid" or (kind == "shift" and deviation(how) is not None):
        return [np.sort(part) for part in np.array_split(rng.permutation(len(y)), clients)]
    try:
        if kind == "dirichlet" and (alpha := float(said)) > 0:
            return _filled(_dirichlet(_classes(y), clients, alpha, rng))
        if kind == "quantity" and (alpha := float(said)) > 0:
            return _filled(_dirichlet([np.arange(len(y))], clients, alpha, rng))
        if kind == "shards" and 0 < (shards := int(said)) * clients <= len(y):
            pieces = np.array_split(np.argsort(y, kind="stable"), clients * shards)
            drawn = rng.permutation(clients * shards).reshape(clients, shards)
            return [np.sort(np.concatenate([pieces[piece] for piece in mine])) for mine in drawn]
    except ValueError as error:
        raise DataError(f"partition '{how}': it is {KINDS}") from error
    raise DataError(f"partition '{how}': it is {KINDS}, with a number above 0 and no more shards than rows")


def deviation(how: str) -> float | None:
    """Return σ of `shift:σ`; None for any other partition.

    >>> deviation("shift:0.5"), deviation("iid")
    (0.5, None)
    """
    kind, _, said = how.partition(":")
    try:
        return float(said) if kind == "shift" and 0 < float(said) < np.inf else None
    except ValueError:
        return None


def strengths(sigma: float, clients: int) -> NDArray[np.float64]:
    """Return the deviation of each client's noise under `shift:σ`, `[clients]`.

    >>> strengths(1.0, 4).round(2).tolist()
    [0.5, 0.71, 0.87, 1.0]
    """
    return np.asarray(np.sqrt(sigma * np.arange(1, clients + 1) / clients))


def shifted(x: NDArray[Any], sigma: float, number: int, clients: int, seed: int) -> NDArray[Any]:
    """Return a client's rows with Gaussian noise of its own strength, of variance σ · number / clients; numbers begin at 1.

    Source: Li et al. 2022, section 4.2.
    """
    noise = np.random.default_rng([seed, number]).standard_normal(x.shape)
    added: NDArray[Any] = x + noise * strengths(sigma, clients)[number - 1]
    return added.astype(x.dtype if x.dtype.kind == "f" else np.float32)


def by_key(keys: NDArray[Any]) -> dict[str, NDArray[np.intp]]:
    """Return the row numbers of each value of a natural key, such as speaker or hospital.

    >>> {name: rows.tolist() for name, rows in by_key(np.array(["b", "a", "b"])).items()}
    {'a': [1], 'b': [0, 2]}
    """
    values, which = np.unique(keys, return_inverse=True)
    order, bounds = np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1]
    return {str(value): rows for value, rows in zip(values, np.split(order, bounds), strict=True)}


def _classes(y: NDArray[np.float64]) -> list[NDArray[np.intp]]:
    found = np.unique(y)
    if len(found) > _CLASSES:
        raise DataError(f"partition by class: the target has {len(found)} different values; use iid or shards")
    return [np.flatnonzero(y == value) for value in found]


def _dirichlet(
    classes: list[NDArray[np.intp]], clients: int, alpha: float, rng: np.random.Generator
) -> list[list[NDArray[np.intp]]]:
    parts: list[list[NDArray[np.intp]]] = [[] for _ in range(clients)]
    for rows in classes:
        cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(int)
        for part, share in zip(parts, np.split(rng.permutation(rows), cuts), strict=True):
            part.append(share)
    return parts


def _filled(parts: list[list[NDArray[np.intp]]]) -> list[NDArray[np.intp]]:
    """Give clients that drew hardly a row some of whoever has most."""
    found = [np.concatenate(part) for part in parts]
    least = min(_LEAST, sum(map(len, found)) // len(found))
    for number in range(len(found)):
        while len(found[number]) < least:
            most = max(range(len(found)), key=lambda k: len(found[k]))
            found[number], found[most] = np.append(found[number], found[most][-1]), found[most][:-1]
    return [np.sort(part) for part in found]
