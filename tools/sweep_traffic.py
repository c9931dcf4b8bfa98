# SPDX-License-Identifier: Apache-2.0
"""Bytes a token from the traffic reports of a run, of each of its parts if it was resumed.

A report counts from the start of its process to its last checkpoint or its end. A process that was
stopped saves at once; one that crashed loses the steps after its last save, and the next one does
them again. So the parts add up to the whole training, each step once, with its evaluations; unless
a process was killed between a checkpoint and its report: bytes a token are of what is counted.

Evaluations send activations forward and nothing back. All payloads of a boundary and direction have
one size, and training sends as many back as forward; so what training alone sent forward is

    F · n_b / n_f      F bytes forward, n_f payloads forward, n_b back, all of them of the reports.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mapl.traffic import KINDS


@dataclass(frozen=True)
class TokenTraffic:
    """Bytes a token of training, mean over the boundaries, evaluations left out.

    Attributes:
        forward: activations, with ids, headers and what streams beside them.
        backward: gradients.
        once_a_step: projectors and whole codebooks, both ways, spread over the tokens of a step.
        uncompressed: what plain Megatron sends, in each direction.
        with_evaluations: bytes in the reports, evaluations included, over all boundaries.
        tokens: of training that the reports count.
    """

    forward: float
    backward: float
    once_a_step: float
    uncompressed: float
    with_evaluations: int
    tokens: int

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over all bytes that crossed, both of both directions."""
        return 2 * self.uncompressed / (self.forward + self.backward + self.once_a_step)


def token_traffic(reports: Iterable[dict[str, Any]]) -> TokenTraffic:
    """What the parts of a run sent.

    Args:
        reports: mapl_traffic.json of each part.

    Raises:
        ValueError: they count no step.
    """
    tokens = 0
    sums: dict[int, Counter[str]] = defaultdict(Counter)
    for report in reports:
        tokens += report["tokens"]
        for boundary in report["boundaries"]:
            _add(sums[boundary["boundary"]], boundary)
    if not tokens:
        raise ValueError("no traffic report counts a step")
    scale = 1 / (tokens * len(sums))
    total: Counter[str] = sum(sums.values(), Counter())
    forward = sum(s["forward"] * s["backward payloads"] / s["forward payloads"]
                  for s in sums.values())  # fmt: skip
    # Of each payload, whichever its direction, plain Megatron sends as many bytes.
    plain = sum(
        s["uncompressed"]
        * s["backward payloads"]
        / (s["forward payloads"] + s["backward payloads"])
        for s in sums.values()
    )
    return TokenTraffic(
        forward=forward * scale,
        backward=total["backward"] * scale,
        once_a_step=total["once a step"] * scale,
        uncompressed=plain * scale,
        with_evaluations=total["forward"] + total["backward"] + total["once a step"],
        tokens=tokens,
    )


def _add(sums: Counter[str], boundary: dict[str, Any]) -> None:
    sums["uncompressed"] += boundary["uncompressed"]
    for direction, entry in boundary.items():
        if not isinstance(entry, dict):
            continue
        size = sum(entry[kind] for kind in KINDS)
        if direction in ("forward", "backward"):
            sums[direction] += size
            sums[f"{direction} payloads"] += entry["payloads"]
        else:
            sums["once a step"] += size
