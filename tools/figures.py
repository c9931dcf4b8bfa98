# SPDX-License-Identifier: Apache-2.0
"""What all pictures of the tools have in common."""

import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

from mapl.files import write_atomically

#: Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}


def colour(place: int) -> str:
    """Of the run at a place among others: duller where `COLOURS` begins anew."""
    turn, index = divmod(place, len(COLOURS))
    kept = 0.5**turn
    channels = (int(COLOURS[index][start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(kept * c + (1 - kept) * 0x80):02X}" for c in channels)


def plain(text: str) -> str:
    """A name as a label shows it: no `$` begins a formula, no `_` hides it from the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


@contextmanager
def _styled_figure(figsize: tuple[float, float]) -> Generator[Any]:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=figsize, layout="constrained")
        try:
            yield figure
        finally:
            pyplot.close(figure)


def _content(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


@contextmanager
def picture(path: Path, *, figsize: tuple[float, float]) -> Generator[Any]:
    """A figure of Matplotlib to draw in, then written as PNG, whole or not at all.

    Args:
        path: of the PNG; its folder is made.
        figsize: inches, at 150 dots each.
    """
    with _styled_figure(figsize) as figure:
        yield figure
        content = _content(figure)
    write_atomically(path, content)


def png(figsize: tuple[float, float], draw: Callable[[Any, Any], None]) -> bytes:
    """A picture of one panel that is not written to a file.

    Args:
        figsize: inches, at 150 dots each.
        draw: fills the figure and its axes.
    """
    with _styled_figure(figsize) as figure:
        draw(figure, figure.subplots())
        return _content(figure)


def save(
    path: Path, panels: int, size: tuple[float, float], draw: Callable[[Any, list[Any]], None]
) -> None:
    """A picture of panels side by side.

    Args:
        size: width and height, inches.
        draw: fills the figure and its panels' axes.
    """
    with picture(path, figsize=size) as figure:
        draw(figure, list(figure.subplots(1, panels, squeeze=False)[0]))
