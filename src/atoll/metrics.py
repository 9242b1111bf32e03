"""Well-known metrics: what a node adds up over its rows, and the figures that such sums give, as if all rows lay in one place.

Each metric is two halves. Beside the data, counts and sums over rows, under names that begin alike; they add up over
nodes, and there are only so many of them (`names`), so that a sum under masks can carry them. At the server, figures from
the added sums alone. What has no exact sums (AUC) is counted in bins, and says how far off it can be. Rank 1, under the plan.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LearnerError, PlanError
from atoll.vector import Metrics

Task = Literal["binary", "classes", "numbers"]
"""What outputs stand for: one logit a row, one score a class, or the numbers themselves."""
Floats = NDArray[np.float64]
Count = Callable[[NDArray[Any], NDArray[Any]], Metrics]
"""`count(scores, y)`: the sums of some rows. Scores are logits `[rows]` of class 1, logits `[rows, classes]`, or numbers."""

BINS, _LINEAR, _LARGEST = 1000, 0.05, 40.0
"""AUC counts logits in bins whose edges are at equal steps of asinh(logit / 0.05), from −40 to 40: steps of 0.0007 near zero
and of 1.5 % of the logit far from it, so that the first rounds' small logits are told apart, and the last ones' large too."""
CHANCES = 15
"""Bins of equal width that chances are counted in for calibration; as in Guo et al. 2017, section 5."""


PLACES = 64
"""Bins of equal width over `model.range` that targets and predictions are counted in for the c-index; what lies beyond is in
the outermost ones."""
Range = tuple[float, float]


class _Metric(NamedTuple):
    """What a metric needs: `sums` beyond those that every learner gives, by the family's name; chances, or scores alone."""

    tasks: tuple[Task, ...]
    sums: str = ""
    chances: bool = False
    better: Literal["lower", "higher"] = "higher"


_TWO: tuple[Task, ...] = ("binary",)
_LABELS: tuple[Task, ...] = ("binary", "classes")
_NUMBERS: tuple[Task, ...] = ("numbers",)
KNOWN: Mapping[str, _Metric] = {
    "loss": _Metric((*_LABELS, *_NUMBERS), better="lower"),
    "accuracy": _Metric(_LABELS),
    "precision": _Metric(_TWO),
    "recall": _Metric(_TWO),
    "f1": _Metric(_TWO),
    "auc": _Metric(_TWO, "auc"),
    "f1_macro": _Metric(_LABELS, "class"),
    "precision_macro": _Metric(_LABELS, "class"),
    "recall_macro": _Metric(_LABELS, "class"),
    "brier": _Metric(_LABELS, "brier", chances=True, better="lower"),
    "ece": _Metric(_LABELS, "chance", chances=True, better="lower"),
    "mean_squared_error": _Metric(_NUMBERS, better="lower"),
    "root_mean_squared_error": _Metric(_NUMBERS, better="lower"),
    "mean_absolute_error": _Metric(_NUMBERS, better="lower"),
    "r2": _Metric(_NUMBERS),
    "c_index": _Metric(_NUMBERS, "c_index"),
}
"""The metrics that a plan may name in `model.metrics`; in its tables they stand in this order."""
ALWAYS = tuple(name for name, metric in KNOWN.items() if not metric.sums)
"""Those that every learner's own sums give, whether a plan names them or not."""
ASIDE = frozenset({*ALWAYS, "auc_within", "c_index_within"} - {"loss", "accuracy"})
"""Figures that there always are, or that go with another one: tables and curves show them where a plan names them."""
_ALSO = {
    "rmse": "root_mean_squared_error", "mse": "mean_squared_error", "mae": "mean_absolute_error", "roc_auc": "auc",
    "auroc": "auc", "f1_score": "f1", "calibration": "ece", "macro_f1": "f1_macro", "log_loss": "loss", "concordance": "c_index",
}  # fmt: skip


def meant(name: str, known: Iterable[str] = KNOWN) -> str:
    """Say which metric may have been meant, or which there are.

    >>> meant("acuracy"), meant("rmse")
    ("did you mean 'accuracy'?", "did you mean 'root_mean_squared_error'?")
    """
    known = list(known)
    close = [_ALSO[name]] if _ALSO.get(name) in known else difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def fits(name: str, task: Task | None, labels: Sequence[int], span: Range | None = None, *, chances: bool) -> None:
    """Check that a model can be judged by a metric; arguments as in `counting`.

    Raises:
        PlanError: naming the metric, and one to take instead.
    """
    metric = KNOWN[name]
    if task is None:
        raise PlanError(
            f"model.metrics: '{name}' needs to know what outputs stand for, and the model brings a loss of its own: "
            "name a known model.loss, or a function as metric"
        )
    tasks: tuple[str, ...] = (*metric.tasks, "classes") if "binary" in metric.tasks and len(labels) == 2 else metric.tasks
    if task not in tasks:
        mine = [one for one, other in KNOWN.items() if task in other.tasks and (chances or not other.chances)]
        model = {"binary": "two classes", "classes": f"{len(labels)} classes", "numbers": "numbers"}
        raise PlanError(f"model.metrics: '{name}' is of no model of {model[task]}; such a one knows {', '.join(mine)}")
    if metric.sums == "c_index" and span is None:
        raise PlanError(f"model.metrics: '{name}' counts targets in bins: say between what they lie, model.range = [low, high]")
    if metric.chances and not chances:
        raise PlanError(f"model.metrics: '{name}' needs chances, and this loss gives scores alone: use a cross-entropy, or 'auc'")


def counting(names: Collection[str], task: Task, labels: Sequence[int], span: Range | None = None) -> Count:
    """Return what counts all that some metrics need.

    Args:
        names: the metrics, each of which `fits`.
        task: what scores stand for.
        labels: the classes, in the order of their scores.
        span: between what numbers lie.

    Raises (when counting):
        LearnerError: a score is NaN, or targets or scores are not of these classes.
    """
    families = dict.fromkeys(KNOWN[name].sums for name in names)

    def count(scores: NDArray[Any], y: NDArray[Any]) -> Metrics:
        scores, y = np.asarray(scores, np.float64), np.asarray(y).reshape(-1)
        if bad := int(np.isnan(scores.reshape(len(y), -1)).any(axis=1).sum()):
            raise LearnerError(
                f"the model's outputs are NaN for {bad} of {len(y)} rows, which no metric can judge: "
                "lower training.learning_rate, or look for huge values in the data"
            )
        if task == "numbers":
            return _c_index(scores, y, span) if span and "c_index" in families else {}
        true = _places(scores, y, labels)
        sums: dict[str, float] = {}
        for family in filter(None, families):
            sums |= _COUNTS[family](scores, true, labels)
        return sums

    return count


def names(asked: Collection[str], labels: Sequence[int]) -> tuple[str, ...]:
    """Return the names of all sums that some metrics can ever give: as many for every node, whatever its rows."""
    families = {KNOWN[name].sums for name in asked if name in KNOWN}
    numbers: Mapping[str, Iterable[Any]] = {
        "auc": [f"{true}.{k}" for true in (0, 1) for k in range(BINS)],
        "class": [f"{kind}.{label}" for kind in ("rows", "said", "hits") for label in labels],
        "chance": [f"{kind}.{k}" for kind in ("rows", "said", "hits") for k in range(CHANCES)],
        "c_index": [f"{true}.{said}" for true in range(PLACES) for said in range(PLACES)],
    }
    plain = ["brier"] if "brier" in families else []
    return (*plain, *(f"{family}.{number}" for family in numbers if family in families for number in numbers[family]))


def binned(name: str) -> bool:
    """Say whether a sum is a count of the rows in one of many bins: that a node has it at all says where its rows lie.

    >>> binned("auc.1.500"), binned("brier"), binned("fit.loss")
    (True, False, False)
    """
    return name.partition(".")[0] in _FINISH


def _places(scores: Floats, y: NDArray[Any], labels: Sequence[int]) -> NDArray[np.intp]:
    """Return each row's class as its place among the labels."""
    if scores.ndim == 2 and scores.shape[1] != len(labels):
        raise LearnerError(
            f"the model gives {scores.shape[1]} scores a row, and the plan names {len(labels)} classes: "
            f"say model.classes = {list(range(scores.shape[1]))}"
        )
    known = np.asarray(labels)
    places = np.minimum(np.searchsorted(known, y), len(known) - 1)
    if (wrong := known[places] != y).any():
        raise LearnerError(
            f"the target {y[wrong][0]} is none of the plan's classes {list(labels)}: see model.classes, data.positive"
        )
    return places


def _logits(scores: Floats) -> Floats:
    """Return the logits `[rows]` of the second of two classes."""
    return scores if scores.ndim == 1 else scores[:, 1] - scores[:, 0]


def _chances(scores: Floats) -> Floats:
    """Return the chances `[rows, classes]`."""
    if scores.ndim == 1:
        scores = np.column_stack([np.zeros_like(scores), scores])
    with np.errstate(invalid="ignore"):  # infinity minus infinity, of scores that are sure
        away = np.nan_to_num(scores - scores.max(axis=1, keepdims=True), nan=0.0, neginf=-np.inf)
    chances: Floats = np.exp(away)
    chances /= chances.sum(axis=1, keepdims=True)
    return chances


def _decided(scores: Floats) -> NDArray[np.intp]:
    return (scores >= 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1)


def _auc(scores: Floats, true: NDArray[np.intp], labels: Sequence[int]) -> dict[str, float]:
    del labels
    step = 2 * math.asinh(_LARGEST / _LINEAR) / BINS
    bins = np.floor(np.arcsinh(np.clip(_logits(scores), -_LARGEST, _LARGEST) / _LINEAR) / step).astype(int) + BINS // 2
    bins = np.clip(bins, 0, BINS - 1)
    return {key: value for at in (0, 1) for key, value in _filled(f"auc.{at}", np.bincount(bins[true == at]))}


def _class(scores: Floats, true: NDArray[np.intp], labels: Sequence[int]) -> dict[str, float]:
    said, many = _decided(scores), len(labels)
    counts = {"rows": np.bincount(true, minlength=many), "said": np.bincount(said, minlength=many)}
    counts["hits"] = np.bincount(true[said == true], minlength=many)
    return {
        f"class.{kind}.{label}": float(found[k]) for kind, found in counts.items() for k, label in enumerate(labels) if found[k]
    }


def _brier(scores: Floats, true: NDArray[np.intp], labels: Sequence[int]) -> dict[str, float]:
    away = _chances(scores)
    away[np.arange(len(true)), true] -= 1
    return {"brier": float((away**2).sum()) / (2 if len(labels) == 2 else 1)}  # of two classes: of the second's chance alone


def _chance(scores: Floats, true: NDArray[np.intp], labels: Sequence[int]) -> dict[str, float]:
    chances = _chances(scores)
    if len(labels) == 2:
        said, hits = chances[:, 1], true == 1
    else:
        said, hits = chances.max(axis=1), chances.argmax(axis=1) == true
    bins = np.minimum((said * CHANCES).astype(int), CHANCES - 1)
    sums = {"rows": np.bincount(bins), "said": np.bincount(bins, said), "hits": np.bincount(bins, hits)}
    return {key: value for kind, found in sums.items() for key, value in _filled(f"chance.{kind}", found)}


def _c_index(predicted: Floats, y: NDArray[Any], span: Range) -> dict[str, float]:
    low, high = span
    true, said = (
        np.clip(np.floor((numbers - low) / (high - low) * PLACES), 0, PLACES - 1).astype(int) for numbers in (y, predicted)
    )
    table = np.bincount(true * PLACES + said, minlength=PLACES**2)
    return {f"c_index.{k // PLACES}.{k % PLACES}": float(table[k]) for k in np.flatnonzero(table)}


_COUNTS: Mapping[str, Callable[[Floats, NDArray[np.intp], Sequence[int]], dict[str, float]]] = {
    "auc": _auc, "class": _class, "brier": _brier, "chance": _chance,
}  # fmt: skip


_LEAST = 0.5
"""A count that was hidden comes back nearly whole: less than this is none."""


def _filled(family: str, counts: NDArray[Any]) -> list[tuple[str, float]]:
    """Return the counts that are not zero, by name: zeros needn't travel."""
    return [(f"{family}.{k}", float(counts[k])) for k in np.flatnonzero(counts)]


def figures(sums: Metrics) -> dict[str, float]:
    """Return the figures that sums of many rows give, in the order of `KNOWN`; those that are undefined are left out.

    AUC is off by at most `auc_within`: half the share of pairs of one row of each class whose logits fall into one bin.

    Sources: AUC as the share of such pairs in the right order, ties half: Hanley and McNeil 1982. Expected calibration
    error: Guo et al. 2017, eq. 3; of two classes by the chance of the second, of more by that of the class decided for.
    C-index: Harrell et al. 1982, without censoring: of pairs of rows with different targets the share whose predictions are in
    the same order, ties half; it is off by at most `c_index_within`, which follows from the pairs in one bin of the one or the
    other. Brier 1950: of two classes of the second's chance alone, as scikit-learn has it. Macro averages go over the classes
    that occur in truth or decision; a class that is never decided for has precision 0.

    >>> figures({"samples": 4.0, "loss": 2.0, "correct": 3.0, "brier": 1.0})
    {'loss': 0.5, 'accuracy': 0.75, 'brier': 0.25}
    """
    rows = sums.get("samples", 0.0)
    if not rows:
        return {}
    found: dict[str, float] = {}
    if "loss" in sums:
        found["loss"] = sums["loss"] / rows
    if "correct" in sums:
        found["accuracy"] = sums["correct"] / rows
    if "true_positive" in sums:
        found |= _confused(*(sums[name] for name in ("true_positive", "false_positive", "false_negative")))
    families: dict[str, dict[str, float]] = {}
    for name, value in sums.items():
        family, dot, rest = name.partition(".")
        if dot and family in _FINISH:
            families.setdefault(family, {})[rest] = value
    for family in _FINISH:
        if family in families:
            found |= _FINISH[family](families[family])
    if "brier" in sums:
        found["brier"] = sums["brier"] / rows
    return found | _of_numbers(sums, rows)


def _confused(hit: float, alarm: float, missed: float) -> dict[str, float]:
    parts = {"precision": (hit, hit + alarm), "recall": (hit, hit + missed), "f1": (2 * hit, 2 * hit + alarm + missed)}
    return {name: part / whole for name, (part, whole) in parts.items() if whole}


def _of_numbers(sums: Metrics, rows: float) -> dict[str, float]:
    """Source of R²: 1 − Σ(y−ŷ)² / Σ(y−ȳ)², here from its sums."""
    if "squared_error" not in sums:
        return {}
    squared = sums["squared_error"] / rows
    found = {"mean_squared_error": squared, "root_mean_squared_error": math.sqrt(squared)}
    found["mean_absolute_error"] = sums["absolute_error"] / rows
    spread = sums["target_squared"] - sums["target"] ** 2 / rows
    return {**found, "r2": 1 - sums["squared_error"] / spread} if spread > 0 else found


def _ranked(sums: Mapping[str, float]) -> dict[str, float]:
    low, high = (_binned(sums, f"{true}.", BINS) for true in (0, 1))
    pairs = low.sum() * high.sum()
    if not pairs > _LEAST:
        return {}
    return {"auc": float(high @ (np.cumsum(low) - low / 2) / pairs), "auc_within": float(high @ low / pairs / 2)}


def _macro(sums: Mapping[str, float]) -> dict[str, float]:
    labels = sorted(
        {label for kind, _, label in (name.partition(".") for name, value in sums.items() if value > _LEAST) if kind != "hits"}
    )
    rows, said, hits = (np.array([sums.get(f"{kind}.{label}", 0.0) for label in labels]) for kind in ("rows", "said", "hits"))
    parts = {"f1": (2 * hits, rows + said), "precision": (hits, said), "recall": (hits, rows)}
    return {f"{name}_macro": float(np.mean(part / np.maximum(whole, 1))) for name, (part, whole) in parts.items()}


def _calibrated(sums: Mapping[str, float]) -> dict[str, float]:
    rows, said, hits = (_binned(sums, f"{kind}.", CHANCES) for kind in ("rows", "said", "hits"))
    return {"ece": float(np.abs(said - hits).sum() / rows.sum())} if rows.sum() > _LEAST else {}


def reliability(sums: Metrics) -> list[dict[str, float]]:
    """Return the reliability curve: of each bin that has rows the mean `chance` said, the share `seen`, and its `rows`."""
    rows, said, hits = (_binned(sums, f"chance.{kind}.", CHANCES) for kind in ("rows", "said", "hits"))
    shares = ((float(said[k] / rows[k]), float(hits[k] / rows[k]), float(rows[k])) for k in np.flatnonzero(rows > _LEAST))
    return [dict(zip(("chance", "seen", "rows"), one, strict=True)) for one in shares]


def spread(by_node: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return how far apart nodes' own figures lie: whether a model that is good on the whole is good for everybody.

    Args:
        by_node: node → its figures.

    Returns:
        Of each well-known figure: `worst` and the `node` that has it; `tenth`, which the worst tenth of nodes doesn't do better
        than; the standard `deviation` over nodes, each counting the same; how many `nodes` have it.

    Source: Li et al. 2020, "Fair Resource Allocation in Federated Learning", section 4.1.

    >>> spread({"a": {"accuracy": 1.0}, "b": {"accuracy": 0.5}})
    {'accuracy': {'worst': 0.5, 'node': 'b', 'tenth': 0.55, 'deviation': 0.25, 'nodes': 2}}
    """
    found = {}
    for name, metric in KNOWN.items():
        values = {node: one[name] for node, one in by_node.items() if math.isfinite(one.get(name, math.nan))}
        if values:
            falls = metric.better == "lower"
            worst = (max if falls else min)(values, key=values.__getitem__)
            numbers = np.array(list(values.values()))
            tenth, deviation = float(np.percentile(numbers, 90 if falls else 10)), float(numbers.std())
            found[name] = {"worst": values[worst], "node": worst, "tenth": tenth, "deviation": deviation, "nodes": len(values)}
    return found


def _concordant(sums: Mapping[str, float]) -> dict[str, float]:
    table = _binned(sums, "", PLACES**2, lambda k: f"{k // PLACES}.{k % PLACES}").reshape(PLACES, PLACES)
    lower = np.cumsum(table, axis=0) - table  # of targets in lower bins, by the prediction's bin
    right = float((table * (np.cumsum(lower, axis=1) - lower)).sum())
    tied = float((table * lower).sum())
    rows = table.sum(axis=1)
    pairs = float((rows * (np.cumsum(rows) - rows)).sum())
    near = float((rows * (rows - 1)).sum() / 2)  # of which it isn't known whether their targets differ
    if not pairs > _LEAST:
        return {}
    found = (right + tied / 2) / pairs
    most, least = (right + tied + near) / (pairs + near), right / (pairs + near)
    return {"c_index": found, "c_index_within": max(most - found, found - least)}


_FINISH: Mapping[str, Callable[[Mapping[str, float]], dict[str, float]]] = {
    "auc": _ranked, "class": _macro, "chance": _calibrated, "c_index": _concordant,
}  # fmt: skip


def _binned(sums: Mapping[str, float], start: str, bins: int, said: Callable[[int], Any] = int) -> Floats:
    return np.array([sums.get(f"{start}{said(k)}", 0.0) for k in range(bins)])
