# SPDX-License-Identifier: Apache-2.0
"""What a section of the page is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from figures import png
from report_runs import Recorded

#: Inches of a picture of the page: its letters are to be read on a telephone too.
SIZE = (6.2, 3.6)
# Inches of a line of the legend.
_LEGEND_LINE = 0.2


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: of its file, without folder and suffix.
        alt: what it shows, for who does not see it.
        content: a PNG.
    """

    name: str
    alt: str
    content: bytes


@dataclass(frozen=True)
class Table:
    """A table; its first `headings` columns say what a row is about."""

    caption: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    headings: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor.
        without: names of the runs that have no such data.
    """

    key: str
    title: str
    text: str
    without: Sequence[str]
    pictures: Sequence[Picture] = field(default_factory=list)
    tables: Sequence[Table] = field(default_factory=list)


def names_without(runs: Sequence[Recorded], those: Sequence[Recorded]) -> list[str]:
    """The names of the runs that are not among those with data."""
    return [recorded.run.name for recorded in runs if recorded not in those]


def panel(
    name: str, alt: str, draw: Callable[[Any], None], *, legend: bool = True, rows: int = 0
) -> Picture:
    """A picture of one panel, its legend below it.

    Args:
        draw: fills the axes.
        rows: of bars that lie one above the other; with many the picture is taller.
    """

    def fill(drawn: Any, axes: Any) -> None:
        draw(axes)
        if legend:
            if axes.get_legend():
                axes.get_legend().remove()
            handles, labels = axes.get_legend_handles_labels()
            width, height = drawn.get_size_inches()
            drawn.set_size_inches(width, height + _LEGEND_LINE * len(labels))
            drawn.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9)

    width, height = SIZE
    return Picture(name, alt, png((width, max(height, 1.2 + 0.45 * rows)), fill))
