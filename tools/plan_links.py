# SPDX-License-Identifier: Apache-2.0
"""The links between consecutive stages: as given, or as measured."""

import math
from collections.abc import Sequence
from pathlib import Path

import link_measurements
from pipeline_step import Direction, Link


def given(bandwidths: Sequence[float], latencies: Sequence[float], count: int) -> list[Link]:
    """Links that are the same in both directions.

    Args:
        bandwidths: Mbit/s of each direction: one for all links, or one for each.
        latencies: milliseconds one way: the same.
        count: how many links there are.

    Raises:
        ValueError: another number of them, or one out of range.
    """
    if not all(0 < mbit < math.inf for mbit in bandwidths):
        raise ValueError(f"--bandwidth {_said(bandwidths)}: Mbit/s must be positive and finite")
    if not all(0 <= ms < math.inf for ms in latencies):
        raise ValueError(f"--latency {_said(latencies)}: milliseconds must be 0 or more and finite")
    each = [
        Direction(mbit * 1e6, ms / 1e3)
        for mbit, ms in zip(
            _for_each(bandwidths, "--bandwidth", count),
            _for_each(latencies, "--latency", count),
            strict=True,
        )
    ]
    return [Link(direction, direction) for direction in each]


def measured(path: Path, processes: int, count: int) -> list[Link]:
    """Links as measured while both directions were in use; rank p of the file is stage p.

    Args:
        processes: of the pipeline.
        count: how many links there are, see `Job.links`.

    Raises:
        ValueError: the file has not measured one of them.
    """
    found = link_measurements.read(path)

    def direction(sender: int, receiver: int) -> Direction:
        link = found.between(sender, receiver)
        if link is None:
            raise ValueError(
                f"--links {path} has {len(found.hosts)} ranks and no measurement from {sender} to "
                f"{receiver}; measure with a rank on the host of each of the {processes} stages"
            )
        return Direction(link.mbit_both_ways * 1e6, link.latency_ms / 1e3)

    ends = [(p, (p + 1) % processes) for p in range(count)]
    return [Link(direction(one, other), direction(other, one)) for one, other in ends]


def _for_each(values: Sequence[float], flag: str, count: int) -> Sequence[float]:
    if len(values) == 1:
        return list(values) * count
    if len(values) != count:
        if count == 1:
            raise ValueError(
                f"{flag} {_said(values)} gives {len(values)} numbers for the one link of two "
                "processes; give one"
            )
        raise ValueError(
            f"{flag} {_said(values)} gives {len(values)} numbers for {count} links; give one for "
            f"all of them or {count} (with virtual stages the last is that from the last process "
            "to the first)"
        )
    return values


def _said(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
