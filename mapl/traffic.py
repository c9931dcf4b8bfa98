# SPDX-License-Identifier: Apache-2.0
"""The byte ledger: what crossed each boundary, by kind, and what plain Megatron would have sent.

Bytes are counted on the sending side, as a payload is packed. A ratio is always
(uncompressed bytes, both directions) / (all bytes that crossed, both directions).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mapl.payload import Direction, PayloadLayout


@dataclass
class Ledger:
    """What one process has sent."""

    sent: dict[tuple[int, Direction], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )

    def count(self, layout: PayloadLayout, *, uncompressed: int) -> None:
        """Books one payload.

        Args:
            layout: its layout.
            uncompressed: bytes that Megatron without MAPL would have sent in its place.
        """
        entry = self.sent[layout.boundary, layout.direction]
        body = "projector" if layout.direction == Direction.PROJECTOR else "latents"
        entry["header"] += layout.frame_bytes
        entry["ids"] += layout.id_bytes
        entry[body] += layout.body_bytes
        entry["uncompressed"] += uncompressed
        entry["payloads"] += 1


def report(ledgers: Iterable[dict[tuple[int, Direction], Counter[str]]]) -> dict[str, Any]:
    """Adds up the ledgers of all processes.

    Returns:
        `boundaries`: one entry a boundary with bytes by kind for forward, backward and projector;
        `total`: bytes by kind, `sent`, `uncompressed`, their `ratio`, and `overhead`: the share of
        the traffic that is not latents.
    """
    sums: dict[int, dict[Direction, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    total: Counter[str] = Counter()
    for ledger in ledgers:
        for (boundary, direction), entry in ledger.items():
            sums[boundary][direction].update(entry)
            total.update(entry)
    return {
        "boundaries": [
            {
                "boundary": boundary,
                **{d.name.lower(): _by_kind(entry) for d, entry in sorted(directions.items())},
                **_ratio(sum(directions.values(), Counter())),
            }
            for boundary, directions in sorted(sums.items())
        ],
        "total": {**_by_kind(total), **_ratio(total)},
    }


_KINDS = ("header", "ids", "latents", "projector")


def _by_kind(entry: Counter[str]) -> dict[str, int]:
    kinds = {kind: entry[kind] for kind in _KINDS}
    return {**kinds, "payloads": entry["payloads"]}


def _ratio(entry: Counter[str]) -> dict[str, float]:
    sent = sum(entry[kind] for kind in _KINDS)
    return {
        "sent": sent,
        "uncompressed": entry["uncompressed"],
        "ratio": entry["uncompressed"] / sent if sent else 0.0,
        "overhead": 1 - entry["latents"] / sent if sent else 0.0,
    }
