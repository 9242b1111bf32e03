"""Strategies `scan` and `vmap`: many clients' fits in one compiled call, spread over threads.

`scan` fits a few clients one after the other in a call, `vmap` many side by side. Loops run as often as a client's own
steps say, so nothing is computed for steps that aren't there; under `vmap` clients of similar length go together. What a
call holds follows from the cohort and the machine's processors, never from the number of workers: so results don't
depend on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from atoll import algorithms
from atoll.algorithms import Memory
from atoll.errors import AtollError, LayoutError, LearnerError
from atoll.learner import Call, Compiled, Fit, How, Learner, Rows, SideBySide, Together, batches
from atoll.simulate.judged import Judge, narrow
from atoll.simulate.map import Answer, Job, Work, one
from atoll.simulate.tape import Asked, Tape, WantsFitError
from atoll.vector import Flat, Group, Groups, Metrics, Update

_SIDE_BY_SIDE = 128
"""Clients in a call of `vmap`, at most: a power of two, and so are smaller calls."""
_IN_A_ROW = 8
"""Clients in a call of `scan`, at most."""
_SIMILAR = 0.9
"""A client goes into a call of `vmap` if it has at least so much of the steps of the call's longest."""
_BYTES = 1 << 27
"""Of rows, or of models, in a call; a client with more rows than this is fitted by its learner, which takes them by batches."""
_SMALL = 1 << 25
"""Arrays of fewer bytes than this may have more room than is needed."""
_WASTED = 0.1
"""The part of a cohort's work that filling up batches may be, where fewer widths, and so fewer compilations, come of it."""


class Drawn(NamedTuple):
    """A fit that is wanted, with all that is drawn for it: the rows of each batch, one batch after the other."""

    name: str
    asked: Asked
    own: tuple[NDArray[Any], ...]
    order: NDArray[np.intp]
    sizes: NDArray[np.intp]
    width: int
    masked: bool

    @classmethod
    def of(cls, name: str, asked: Asked, own: tuple[NDArray[Any], ...], drawn: Sequence[NDArray[np.intp]]) -> Drawn:
        """Put batches together."""
        sizes = np.array([len(batch) for batch in drawn])
        widest = int(sizes.max())
        return cls(name, asked, own, np.concatenate(drawn), sizes, widest, int(sizes.min()) < widest)

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return len(self.sizes)

    def filled(self, width: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return rows and truth `[steps, width]`: short batches are filled up with the fit's first row."""
        true = np.arange(width) < self.sizes[:, None]
        rows = np.full((self.steps, width), self.order[0])
        rows[true] = self.order
        return rows, true


def together(learner: Learner) -> Together:
    """Return what fits and judges many clients of a learner that can."""
    if isinstance(learner, Compiled):
        from atoll.simulate import loops  # with JAX

        return loops.together(learner.pure())
    return cast("SideBySide", learner).together()


class Vectorised:
    """Compiled calls over many clients; see `Strategy`.

    Args:
        work: what stays the same.
        how: `scan` or `vmap`.
        workers: threads.
        longest: the most rows that a client has.
        call: where a call is carried out, if not in this process.
    """

    def __init__(self, work: Work, how: How, workers: int, longest: int, call: Call | None = None) -> None:
        self._work, self.name = work, how
        self._learner = together(work.learner)
        self._judge = Judge(self._learner)
        self._call = call or self._learner.fits(how)
        self._most = work.plan.training.pace(longest, 1, work.plan.plan.rounds).steps
        self._lock = Lock()
        self._apart: bool | None = None
        self._why: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(workers)
        self._done = self._spent = 0
        self._ahead: list[Sequence[Rows]] = []

    @property
    def said(self) -> str:
        """See `Strategy.said`."""
        wasted = f"{100 * (1 - self._done / self._spent):.1f} % of the work was padding" if self._spent > self._done else ""
        return "; ".join(
            [*(f"{count} fits one by one: {why}" for why, count in self._why.items()), *([wasted] if wasted else [])]
        )

    def ready(self, holdout: Rows | None) -> None:
        """See `Strategy.ready`; what judging compiles is compiled beside the first fits."""
        self._why, self._done, self._spent = {}, 0, 0
        self._ahead = [[holdout] if holdout else []]

    def train(self, job: Job) -> dict[str, Answer]:
        """See `Strategy.train`."""
        self._compile_ahead(job)
        tapes = {name: Tape(self._work.learner) for name in job.clients}
        answers: dict[str, Answer] = {}
        waiting: Mapping[str, Asked] = _asking(self._work, job, tapes, job.clients, answers)
        while waiting:
            fits = [self.drawn(job.round, name, asked) for name, asked in waiting.items()]
            again: dict[str, Asked] = {}

            def act(call: Callable[[], Mapping[str, Fit]], again: dict[str, Asked] = again) -> None:
                done = call()
                for name, fit in done.items():
                    tapes[name].record(fit, waiting[name].rng)  # noqa: B023  each pass of the loop waits for its calls
                again.update(_asking(self._work, job, tapes, done, answers))

            for _ in self._threads.map(act, self._planned(fits, job, answers)):
                pass
            waiting = again
        if apart := sum(tape.apart for tape in tapes.values()):
            self._because(f"'{self._work.plan.aggregation.rule}' corrects each gradient", apart)
        return self._with_judgement(job, answers) if job.judged else answers

    def _compile_ahead(self, job: Job) -> None:
        """Judge once what will be judged again and again, while the first clients train."""
        if not self._ahead:
            return
        model = {name: job.brief[name] for name in self._work.learner.layouts}
        for parts in (*self._ahead, [] if self._work.algorithm.silent else [data.judge for _, data in job.clients.values()]):
            self._threads.submit(self.judge, model, parts)
        self._ahead = []

    def _because(self, why: str, count: int = 1) -> None:
        self._why[why] = self._why.get(why, 0) + count

    def _with_judgement(self, job: Job, answers: dict[str, Answer]) -> dict[str, Answer]:
        if self._work.algorithm.own is not None:  # each has a model of its own
            return self._with_own(job, answers)
        model = {name: job.brief[name] for name in self._work.learner.layouts}
        there = {name: answer for name, answer in answers.items() if not isinstance(answer, AtollError)}
        received = self.judge(model, [job.clients[name][1].judge for name in there])
        for (name, (memory, update)), sums in zip(there.items(), received, strict=True):
            answers[name] = _with(memory, update, sums)
        return answers

    def _with_own(self, job: Job, answers: dict[str, Answer]) -> dict[str, Answer]:
        for name, answer in answers.items():
            if not isinstance(answer, AtollError):
                memory, data = job.clients[name]
                received = self._work.learner.evaluate(
                    algorithms.own(*self._work, job.brief, memory, data, job.round, name), data.judge
                )
                answers[name] = _with(*answer, received)
        return answers

    def drawn(self, round_: int, name: str, asked: Asked) -> Drawn:
        """Draw for a fit just what the learner's own `fit` draws."""
        del round_
        own = self._learner.own(asked.rng, asked.rate)
        return Drawn.of(name, asked, own, list(batches(asked.rng, len(asked.rows), asked.batch_size, asked.steps)))

    def _planned(self, fits: Sequence[Drawn], job: Job, answers: dict[str, Answer]) -> Iterator[Callable[[], Mapping[str, Fit]]]:
        """Put fits together that one call can hold; what none can is left to the learner."""

        def alone(name: str) -> Mapping[str, Fit]:
            answers[name] = one(self._work, job._replace(judged=False), name)
            return {}

        mask = any(fit.masked for fit in fits) and self._may_mask(max((fit.asked.rows for fit in fits), key=len))
        like: dict[Any, list[Drawn]] = {}
        for fit in fits:
            rows = fit.asked.rows
            size = fit.steps * fit.width * (rows.x.nbytes // max(1, len(rows)))
            if size > _BYTES or (fit.masked and not mask):
                self._because("its rows are many" if size > _BYTES else "its last batch is short, which its model would notice")
                yield partial(alone, fit.name)
                continue
            form = (rows.x.shape[1:], rows.x.dtype.kind, rows.y.shape[1:], rows.y.dtype.kind)
            shared = all(group.values is job.brief[name].values for name, group in fit.asked.groups.items() if name in job.brief)
            like.setdefault((form, shared), []).append(fit)
        even = fits[0].steps if len({(fit.steps, fit.width) for fit in fits}) == 1 else 0
        at_once = min(_IN_A_ROW, -(-len(fits) // (os.cpu_count() or 1)))
        for (_, shared), alike in like.items():
            for width, group in _by_width(alike, filled=mask).items():
                for piece in self._cut(sorted(group, key=lambda fit: -fit.steps), width, at_once):
                    yield partial(self._fitted, piece, width, at_once, (shared, even, mask))

    def _may_mask(self, rows: Rows) -> bool:
        if self._apart is None:
            if len(rows) < 2:
                return False
            # Few rows, again and again, would have one mean in a whole batch and in half of it: so the last one is repeated.
            x, _ = self._learner.arrays(rows, np.minimum(np.arange(8), len(rows) - 1))
            with _said(self.name, rows):
                self._apart = self._learner.apart(x)
        return self._apart

    def _cut(self, fits: Sequence[Drawn], width: int, at_once: int) -> Iterator[Sequence[Drawn]]:
        """Cut fits, the longest first, into calls."""
        room = max(1, _BYTES // max(1, fits[0].steps * width * _row(fits)))
        if self.name == "scan":
            size = min(at_once, room)
            yield from (fits[lo : lo + size] for lo in range(0, len(fits), size))
            return
        model = sum(layout.nbytes for layout in self._work.learner.layouts.values())
        most = min(_SIDE_BY_SIDE, room, max(1, _BYTES // (4 * model)))
        at = 0
        while at < len(fits):
            similar = next((k for k in range(at, len(fits)) if fits[k].steps < _SIMILAR * fits[at].steps), len(fits)) - at
            size = 1 << (min(similar, most).bit_length() - 1)
            yield fits[at : at + size]
            at += size

    def _fitted(self, fits: Sequence[Drawn], width: int, at_once: int, kind: tuple[bool, int, bool]) -> Mapping[str, Fit]:
        """Fit some clients in one call."""
        shared, even, mask = kind
        longest = fits[0].steps
        places = at_once if self.name == "scan" else len(fits)

        def filled(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
            return np.stack([*arrays, *[arrays[0]] * (places - len(arrays))])

        x, y, masks = self._gathered(fits, places, self._room(longest, places * width * _row(fits)), width, mask)
        owns = tuple(map(filled, zip(*(fit.own for fit in fits), strict=True)))
        steps = np.array([*(fit.steps for fit in fits), *[0] * (places - len(fits))], np.int32)
        models = [narrow(fit.asked.groups) for fit in fits[: 1 if shared else None]]
        flats = models[0] if shared else {name: filled([model[name] for model in models]) for name in models[0]}
        count = np.int32(len(fits) if self.name == "scan" else longest)
        with _said(self.name, fits[0].asked.rows):
            out, lost = self._call((shared, even), count, flats, owns, x, y, masks, steps)
        self._count(fits, width, longest)
        return {
            fit.name: self._fit(fit, {name: array[k] for name, array in out.items()}, float(lost[k]))
            for k, fit in enumerate(fits)
        }

    def _fit(self, fit: Drawn, flats: Mapping[str, Flat], loss: float) -> Fit:
        groups = {
            name: Group(layout, flats[name].astype(layout.dtype, copy=False))
            for name, layout in self._work.learner.layouts.items()
        }
        return Fit(groups, {"samples": float(len(fit.order)), "loss": loss})

    def _count(self, fits: Sequence[Drawn], width: int, longest: int) -> None:
        with self._lock:
            self._done += sum(len(fit.order) for fit in fits)
            self._spent += sum((longest if self.name == "vmap" else fit.steps) * width for fit in fits)

    def _room(self, steps: int, size: int) -> int:
        """Return for how many steps, of so many bytes, a call's arrays have room: few sizes, since each is compiled anew."""
        self._most = room = max(self._most, steps)
        while room // 4 >= steps and room * size > _SMALL:
            room //= 4
        return room

    def _gathered(self, fits: Sequence[Drawn], places: int, room: int, width: int, mask: bool) -> tuple[Any, Any, Any]:
        """Take the rows of some fits out of their clients' arrays, batch by batch, a short one filled up with its first row."""
        masks = np.zeros((places, room, width), np.float32) if mask else None
        x = y = None
        for k, fit in enumerate(fits):
            order, true = fit.filled(width) if mask else (fit.order, None)
            rows, order = fit.asked.rows, order.reshape(-1)
            if x is None or y is None:
                one = self._learner.arrays(rows, slice(0, 1))
                x, y = (np.empty((places, room, width, *part.shape[1:]), part.dtype) for part in one)
            into = x[k, : fit.steps].reshape(-1, *x.shape[3:])
            if rows.x.dtype == x.dtype:  # taken to its place at once
                np.take(rows.x, order, axis=0, out=into, mode="clip")
                y[k, : fit.steps] = rows.y[order].reshape(fit.steps, width, *y.shape[3:])
            else:
                xs, ys = self._learner.arrays(rows, order)
                into[...], y[k, : fit.steps] = xs, ys.reshape(fit.steps, width, *y.shape[3:])
            if masks is not None and true is not None:
                masks[k, : fit.steps] = true
        return x, y, masks

    def close(self) -> None:
        """See `Strategy.close`."""
        self._threads.shutdown(cancel_futures=True)

    def judge(self, model: Groups, parts: Sequence[Rows]) -> list[Metrics]:
        """See `Strategy.judge`; rows of many clients go through the model together."""
        with _said(self.name, next(iter(parts), None)):
            return self._judge(narrow(model), parts)


@contextmanager
def _said(how: str, rows: Rows | None) -> Iterator[None]:
    """Turn whatever a foreign model raises into one line, as its learner does by itself."""
    try:
        yield
    except AtollError:
        raise
    except Exception as error:  # whatever the model's own code raises
        shape = f" of shape {rows.x.shape[1:]}" if rows else ""
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise LearnerError(f"--strategy {how}: the model can't take rows{shape}: {reason}") from error


def _with(memory: Memory, update: Update, received: Metrics) -> Answer:
    """Put what the received model does to a client's update."""
    try:
        return memory, replace(update, metrics={**algorithms.judged(received), **update.metrics})
    except LayoutError as error:
        return error


def _asking(
    work: Work, job: Job, tapes: Mapping[str, Tape], names: Iterable[str], answers: dict[str, Answer]
) -> dict[str, Asked]:
    """Run the local half of some clients: their answers, or the fits that they ask for."""
    asked = {}
    for name in names:
        memory, data = job.clients[name]
        tapes[name].rewind()
        try:
            answers[name] = algorithms.train(
                work.plan, work.algorithm, tapes[name], job.brief, memory, data.train, job.round, name
            )
        except WantsFitError as wants:
            asked[name] = wants.asked
        except AtollError as error:
            answers[name] = error
    return asked


def _row(fits: Sequence[Drawn]) -> int:
    """How many bytes a row of theirs takes."""
    rows = fits[0].asked.rows
    return rows.x.nbytes // max(1, len(rows))


def _by_width(fits: Sequence[Drawn], *, filled: bool) -> dict[int, list[Drawn]]:
    """Put fits together whose batches are as wide; where short ones may be filled up, in as few widths as waste little."""
    if not filled:
        widths = sorted({fit.width for fit in fits})
        return {width: [fit for fit in fits if fit.width == width] for width in widths}
    found: dict[int, list[Drawn]] = {}
    spare = _WASTED * sum(fit.steps * fit.width for fit in fits)
    for fit in sorted(fits, key=lambda fit: -fit.width):
        width = min(found, default=None)
        waste = fit.steps * (width - fit.width) if width else 0
        if width is None or waste > spare:
            width, waste = min(_rounded(fit.width), fit.asked.batch_size), 0
        spare -= waste
        found.setdefault(width, []).append(fit)
    return found


def _rounded(width: int) -> int:
    """Round a batch's rows up to one of few sizes, at most an eighth more: 1 to 16, 18, 20, … 32, 36 and so on."""
    step = 1 << max(0, (width - 1).bit_length() - 4)
    return -(-width // step) * step
