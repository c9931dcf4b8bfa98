# SPDX-License-Identifier: Apache-2.0
"""Numbers of a report as people read them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Unit:
    """What all byte counts of a table or picture are told in.

    Attributes:
        name: such as MB.
        size: in bytes, a power of 1000.
    """

    name: str
    size: int

    @property
    def spoken(self) -> str:
        """With its size, for an axis."""
        exponent = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(round(math.log10(self.size))))
        return f"{self.name} (10{exponent} bytes)" if self.size > 1 else "bytes"

    def of(self, count: int) -> float:
        """`count` bytes in this unit."""
        return count / self.size

    def text(self, count: int) -> str:
        """The same, to read; what is not nothing does not look like it."""
        if self.size == 1 or count == 0:
            return f"{count:,}"
        return "<0.01" if 0 < self.of(count) < 0.005 else f"{self.of(count):,.2f}"


def unit_of(counts: Iterable[int]) -> Unit:
    """The unit in which the largest count is between 1 and 1000."""
    largest = max(counts, default=0)
    place = min(len(_PREFIXES) - 1, max(0, (len(str(largest)) - 1) // 3))
    return Unit(_PREFIXES[place], 1000**place)


def figure(value: float | None, form: str) -> str:
    """By a format specification; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else format(value, form)
