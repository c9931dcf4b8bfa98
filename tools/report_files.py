# SPDX-License-Identifier: Apache-2.0
"""What report.py's pictures share: reading lines of metrics, colours, and saving a picture."""

import io
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

from mapl.files import write_atomically

# Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class ReportError(ValueError):
    """A report that is missing or not what this tool reads."""


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a mapl_metrics.jsonl, without one that is not whole at its end.

    Raises:
        json.JSONDecodeError: another line is damaged.
    """
    lines = path.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
            break  # a run that goes on, or was killed, may be in the middle of its last line
    return entries


@contextmanager
def picture(path: Path, *, figsize: tuple[float, float]) -> Generator[Any]:
    """A figure of Matplotlib to draw in, then written as PNG, whole or not at all.

    Args:
        path: of the PNG; its folder is made.
        figsize: inches, at 150 dots each.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=figsize, layout="constrained")
        try:
            yield figure
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=150)
        finally:
            pyplot.close(figure)
    write_atomically(path, content.getvalue())
