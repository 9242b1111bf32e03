"""A curve's geometry: where its points, axes and ticks lie in a small SVG; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_LARGEST, _SMALLEST = 1e100, 1e-300
Points = Sequence[tuple[int, float]]


def chart(name: str, series: Mapping[str, Points]) -> dict[str, Any] | None:
    """Return a chart of one figure by round, or None where there is no number to show.

    Args:
        name: of the figure.
        series: label → (round, value), by round; a value that is no number breaks the line and is counted in `odd`.
    """
    drawn = {label: [(x, y) for x, y in points if _is_number(y)] for label, points in series.items()}
    shown = [point for points in drawn.values() for point in points]
    if not shown:
        return None
    across = _Axis([x for x, _ in shown], (_LEFT, WIDTH - _RIGHT), whole=True)
    up = _Axis([y for _, y in shown], (HEIGHT - _BOTTOM, _TOP))
    return {
        "name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "odd": sorted({x for points in series.values() for x, y in points if not _is_number(y)}),
        "across": across.ticks,
        "up": up.ticks,
        "box": {"left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM},
        "lines": [
            {
                "label": label,
                "kind": kind,
                "path": _path([(across.place(x), up.place(y)) if _is_number(y) else None for x, y in series[label]]),
                "dots": [(across.place(x), up.place(y), x, y) for x, y in points],
                "said": _said(points),
            }
            for kind, (label, points) in enumerate(drawn.items())
            if points
        ],
    }


def _is_number(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _said(points: Points) -> str:
    """A curve in words, for whoever can't see it."""
    (first, start), (last, end) = points[0], points[-1]
    if first == last:
        return f"{start:.4g} in round {first}"
    return f"from {start:.4g} in round {first} to {end:.4g} in round {last}"


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """An SVG path through points, broken where there is none."""
    words, pen = [], "M"
    for place in places:
        if place is not None:
            words.append(f"{pen}{place[0]:g} {place[1]:g}")
        pen = "M" if place is None else "L"
    return " ".join(words)


class _Axis:
    """A scale from values to a stretch of the picture, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], stretch: tuple[float, float], *, whole: bool = False) -> None:
        self._lo, self._hi = min(values), max(values)
        if self._hi - self._lo < _SMALLEST:  # one value: something around it, so that there is a scale at all
            around = abs(self._lo) / 10 if abs(self._lo) > 10 * _SMALLEST else 1.0
            self._lo, self._hi = (self._lo, self._hi + 1) if whole else (self._lo - around, self._hi + around)
        self._stretch = stretch
        step = _step((self._hi - self._lo) / 5)
        if whole:
            step = max(1.0, step)
        else:
            self._lo, self._hi = math.floor(self._lo / step) * step, math.ceil(self._hi / step) * step
        first = math.ceil(self._lo / step - 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        self.ticks = [
            (self.place(k * step), f"{k * step:.{digits}f}" if 1e-4 < step < 1e5 else f"{k * step:g}")
            for k in range(first, math.floor(self._hi / step + 1e-9) + 1)
        ]

    def place(self, value: float) -> float:
        """Where a value lies, in the picture's units."""
        start, end = self._stretch
        return round(start + (value - self._lo) / (self._hi - self._lo) * (end - start), 1)


def _step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … (or their tenths, …) that is at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least * (1 - 1e-9))
