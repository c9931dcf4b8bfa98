# SPDX-License-Identifier: Apache-2.0
"""What mapl_metrics.jsonl tells over training, boundary by boundary."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report_curves import number

#: A boundary, a pair of boundaries, or a boundary and a direction.
Key = int | tuple[Any, ...]

# Name → the list of a line that it stands in, and its name there.
_PLACES = {
    "energy": ("boundaries", "energy_kept"),
    "orthonormality": ("boundaries", "orthonormality_error"),
    "skipped": ("boundaries", "skipped_steps"),
    "angle": ("angles", "mean_degrees"),
    "smallest angle": ("angles", "smallest_degrees"),
    "perplexity": ("codebooks", "perplexity"),
    "dead": ("codebooks", "dead"),
}


@dataclass(frozen=True)
class Series:
    """Curves over the same steps.

    Attributes:
        steps: at which there is a value of any.
        curves: the values of each, NaN where there is none.
    """

    steps: list[int]
    curves: Mapping[Key, Sequence[float]]


def read_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Name → series, of those that the lines have something of.

    "communication" is the share of the time between two lines, mean over processes. Only the pairs
    of one run count: a resumed one begins anew.

    Raises:
        KeyError, TypeError, ValueError: a line is not what a run writes.
    """
    found = {
        name: _series([(line["iteration"], _values(line, *place)) for line in lines])
        for name, place in _PLACES.items()
    }
    found["communication"] = _series(_communication(lines))
    return {name: series for name, series in found.items() if series.steps}


def _values(line: Mapping[str, Any], place: str, name: str) -> dict[Key, float]:
    return {_key(entry): number(entry[name]) for entry in line.get(place, [])}


def _key(entry: Mapping[str, Any]) -> Key:
    if "boundaries" in entry:
        return tuple(entry["boundaries"])
    boundary = int(entry["boundary"])
    return (boundary, entry["direction"]) if "direction" in entry else boundary


def _communication(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[Key, float]]]:
    timed = [line for line in lines if "seconds" in line]
    shares: list[tuple[int, dict[Key, float]]] = []
    for before, line in itertools.pairwise(timed):
        past, seconds = before["seconds"], line["seconds"]
        elapsed = seconds["after_first_step"] - past["after_first_step"]
        communicating = seconds["communication"]["mean"] - past["communication"]["mean"]
        if elapsed > 0 and communicating >= 0:
            shares.append((line["iteration"], {0: communicating / elapsed}))
    return shares


def _series(values: Sequence[tuple[int, dict[Key, float]]]) -> Series:
    known = [(step, own) for step, own in values if not all(math.isnan(v) for v in own.values())]
    keys = sorted({key for _, own in known for key in own})
    return Series(
        [int(step) for step, _ in known],
        {key: [own.get(key, math.nan) for _, own in known] for key in keys},
    )
