# SPDX-License-Identifier: Apache-2.0
"""Lines over training: one colour a run, and a shade of it for each boundary."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from figures import colour, plain

# What tells the lines of a run apart, its boundary for one → the value at each step, NaN for none.
type Curves = Mapping[Any, Sequence[float]]


# Up to so many points are marked, on broad lines; more would run into each other.
_MARKED = 25


@dataclass(frozen=True)
class Pen:
    """How a run is drawn."""

    colour: str
    width: float


def pens[T](runs: Sequence[T], places: Sequence[int] | None = None) -> list[tuple[T, Pen]]:
    """Earlier runs are drawn broader, so that they show under later ones of equal values.

    Args:
        runs: that are drawn.
        places: of these among all runs, by which they have their colours; default: they are all.
    """
    widths = (1.5 + 1.5 * min(later, 2) for later in reversed(range(len(runs))))
    places = range(len(runs)) if places is None else places
    return list(zip(runs, map(Pen, map(colour, places), widths), strict=True))


def draw_curves(
    axes: Any,
    steps: Sequence[int],
    curves: Curves,
    pen: Pen,
    *,
    label: str | None = None,
    style: str = "",
) -> None:
    """One line a boundary, from the pen's colour itself to a light shade of it."""
    axes.locator_params(axis="x", integer=True)
    style = style or ("o-" if len(steps) <= _MARKED else "-")
    width = pen.width if len(steps) <= _MARKED else 1.2
    for index, boundary in enumerate(sorted(curves)):
        axes.plot(
            steps, curves[boundary], style, color=_shade(pen.colour, index, len(curves)),
            linewidth=width, markersize=2.5 + width, label=label if index == 0 else None,
            clip_on=False,  # or the axis hides a line of zeros
        )  # fmt: skip


def _shade(colour: str, index: int, count: int) -> tuple[float, ...]:
    white = 0.65 * index / max(1, count - 1)
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return tuple(channel + (1 - channel) * white for channel in channels)


def legend(name: str, keys: Iterable[Any], what: str = "boundary") -> str:
    """Of the lines of one run, for a legend."""
    first, *more = sorted(keys)
    shades = f" (dark) to {spoken(more[-1])} (light)" if more else ""
    return f"{plain(name)}, {what} {spoken(first)}{shades}"


def spoken(key: Any) -> str:
    """A boundary, a pair of them, or a boundary and a direction."""
    if isinstance(key, int):
        return str(key)
    return ("–" if all(isinstance(part, int) for part in key) else " ").join(map(str, key))


def number(value: float | None) -> float:
    """NaN for what could not be measured."""
    return math.nan if value is None else float(value)
