# SPDX-License-Identifier: Apache-2.0
"""What all pictures of the tools have in common."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from mapl.files import write_atomically

#: Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}


def save(
    path: Path, panels: int, size: tuple[float, float], draw: Callable[[Any, list[Any]], None]
) -> None:
    """A PNG of panels side by side, written whole or not at all.

    Args:
        size: width and height, inches.
        draw: fills the figure and its panels' axes.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        try:
            draw(figure, list(axes[0]))
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
        finally:
            pyplot.close(figure)
    write_atomically(path, picture.getvalue())
