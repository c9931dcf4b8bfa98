# SPDX-License-Identifier: Apache-2.0
"""The byte ledger: what crossed each boundary, by kind, and what plain Megatron would have sent.

Bytes are counted on the sending side, as a payload is packed. A ratio is always
(uncompressed bytes, both directions) / (all bytes that crossed, both directions).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from mapl.payload import Direction, PayloadLayout


class Ledger:
    """What one process has sent."""

    def __init__(self) -> None:
        # Payloads are many and alike: they are counted here, and summed up when somebody asks.
        self._payloads: Counter[tuple[PayloadLayout, int, int]] = Counter()

    def count(self, layout: PayloadLayout, *, uncompressed: int, unsplit: int) -> None:
        """Books one payload.

        Args:
            layout: its layout.
            uncompressed: bytes that Megatron without MAPL would have sent in its place.
            unsplit: bytes that this process would have sent if it shared the work with no other
                process that holds the same (tensor-parallel ranks, replicas).
        """
        self._payloads[layout, uncompressed, unsplit] += 1

    @property
    def sent(self) -> dict[tuple[int, Direction], Counter[str]]:
        """Boundary and direction → bytes by kind, and the number of payloads."""
        sent: dict[tuple[int, Direction], Counter[str]] = defaultdict(Counter)
        for (layout, uncompressed, unsplit), payloads in self._payloads.items():
            entry = sent[layout.boundary, layout.direction]
            entry["header"] += payloads * layout.frame_bytes
            entry["ids"] += payloads * layout.id_bytes
            for kind, size in layout.parts:
                entry[kind] += payloads * size
            entry["uncompressed"] += payloads * uncompressed
            entry["unsplit"] += payloads * unsplit
            entry["payloads"] += payloads
        return dict(sent)


def report(ledgers: Iterable[dict[tuple[int, Direction], Counter[str]]]) -> dict[str, Any]:
    """Adds up the ledgers of all processes.

    Returns:
        `boundaries`: one entry a boundary with bytes by kind for each direction, and what follows
        for the boundary; `total`: bytes by kind, `sent`, `uncompressed`, their `ratio`,
        `overhead`: the share of the traffic that is not latents, and `split_factor`: how many times
        more would have been sent if no process shared its payloads with those that hold the same.
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


#: What the bytes of a payload are.
KINDS = ("header", "ids", "latents", "indices", "scales", "codebook", "projector")


def _by_kind(entry: Counter[str]) -> dict[str, int]:
    return {kind: entry[kind] for kind in (*KINDS, "unsplit", "payloads")}


def _ratio(entry: Counter[str]) -> dict[str, float]:
    sent = sum(entry[kind] for kind in KINDS)
    return {
        "sent": sent,
        "uncompressed": entry["uncompressed"],
        "ratio": entry["uncompressed"] / sent if sent else 0.0,
        "overhead": 1 - entry["latents"] / sent if sent else 0.0,
        "split_factor": entry["unsplit"] / sent if sent else 1.0,
    }
