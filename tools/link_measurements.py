# SPDX-License-Identifier: Apache-2.0
"""The file of measured links: written by measure_links.py, read by plan.py."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mapl.files import write_atomically


@dataclass(frozen=True)
class Measured:
    """From one rank to another.

    Attributes:
        mbit: 10⁶ bits of payload a second while nothing comes back.
        mbit_both_ways: the same while as much comes back, as in a pipeline.
        latency_ms: one way: half of what a few bytes take there and back.
        mbit_both_ways_spread: half the range over the rounds, over `mbit_both_ways`.
    """

    sender: int
    receiver: int
    mbit: float
    mbit_both_ways: float
    latency_ms: float
    mbit_both_ways_spread: float


@dataclass(frozen=True)
class Measurements:
    """All that one call of measure_links.py has measured.

    Attributes:
        hosts: of the ranks, in order.
    """

    backend: str
    hosts: list[str]
    links: list[Measured]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def between(self, sender: int, receiver: int) -> Measured | None:
        """The measurement of one direction, if there is one."""
        for link in self.links:
            if (link.sender, link.receiver) == (sender, receiver):
                return link
        return None


def read(path: Path) -> Measurements:
    """What `write` wrote.

    Raises:
        ValueError: there is no such file, or it is another one; says what to do.
    """
    try:
        data = json.loads(path.read_text())
        measured = Measurements(
            backend=data["backend"],
            hosts=list(data["hosts"]),
            links=[Measured(**link) for link in data["links"]],
        )
    except OSError as error:
        raise ValueError(f"--links {path}: {error.strerror}; make it with "
                         "tools/measure_links.py") from None  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--links {path} is not what tools/measure_links.py writes ({error!r}); make it anew"
        ) from None
    for link in measured.links:
        positive = min(link.mbit, link.mbit_both_ways) > 0 and link.latency_ms >= 0
        if not positive:
            raise ValueError(f"--links {path}: rank {link.sender} to {link.receiver} has "
                             f"{link.mbit_both_ways} Mbit/s and {link.latency_ms} ms; bandwidths "
                             "are positive, latencies 0 or more")  # fmt: skip
    return measured
