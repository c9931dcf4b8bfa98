# SPDX-License-Identifier: Apache-2.0
"""Draw a sweep: loss against traffic with the Pareto front, and the losses while training."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from figures import COLOURS, save
from report import smoothed
from sweep_results import Row, front, means


def draw_pareto(rows: Sequence[Row], path: Path) -> bool:
    """Gap against ratio, a panel for each length of training.

    Returns:
        False if there is nothing to draw: no run has both a ratio and a gap.
    """
    points = [row for row in means(rows) if row.ratio is not None and row.gap is not None]
    lengths = sorted({row.tokens for row in points})
    if not lengths:
        return False

    def fill(figure: Any, panels: list[Any]) -> None:
        for axes, tokens in zip(panels, lengths, strict=True):
            _draw_front(figure, axes, [row for row in points if row.tokens == tokens], tokens)

    save(path, len(lengths), (9.5 * len(lengths), 7), fill)
    return True


def _draw_front(figure: Any, axes: Any, rows: Sequence[Row], tokens: int) -> None:
    groups = sorted({row.group for row in rows}, key=[row.group for row in rows].index)
    colours = dict(zip(groups, itertools.cycle(COLOURS[:-1]), strict=False))
    for group, colour in colours.items():
        own = [row for row in rows if row.group == group]
        spreads = [row.gap_spread or 0.0 for row in own]
        axes.errorbar(
            [row.ratio for row in own], [row.gap for row in own], yerr=spreads, fmt="o",
            color=colour, markersize=7, markeredgecolor="white", elinewidth=1.5,
            label=group or None,
        )  # fmt: skip
    # Between two of its settings the cheaper one's loss is not to be had: the step goes up first.
    best = front(rows)
    axes.plot(
        [row.ratio for row in best], [row.gap for row in best], drawstyle="steps-pre",
        color=COLOURS[-1], alpha=0.5, linewidth=1.2, zorder=1, label="front",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ratios = [row.ratio for row in rows if row.ratio is not None]
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t < 2 * max(ratios)]
    axes.set_xticks(ticks)
    axes.set(
        title=f"{tokens / 1e6:,.0f} M tokens",
        xlabel="fewer bytes over the stage boundaries, all bytes of both directions",
        ylabel="validation loss above the uncompressed run's (%)",
        xlim=(0.85, max(2.0, max(ratios) * 1.6)),
    )
    axes.margins(y=0.1)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="upper left")
    _label(figure, axes, rows, colours)


def _label(figure: Any, axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Names each point, in the place around it where it covers fewest others."""
    figure.canvas.draw()
    places = [(7, 5, "left"), (7, -12, "left"), (-7, 5, "right"), (-7, -12, "right"),
              (0, 12, "center"), (0, -20, "center")]  # fmt: skip
    taken = [axes.transData.transform((row.ratio, row.gap)) for row in rows]
    boxes: list[Any] = []
    for row in rows:
        tries: list[tuple[int, int, Any, Any]] = []
        for x, y, side in places:
            text = axes.annotate(
                row.label, (row.ratio, row.gap), (x, y), textcoords="offset points", ha=side,
                fontsize=8.5, color=colours[row.group],
            )  # fmt: skip
            box = text.get_window_extent()
            covered = sum(box.overlaps(other) for other in boxes)
            covered += sum(box.contains(*point) for point in taken)
            covered += not (axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1)
            tries.append((covered, len(tries), text, box))
        *_, kept, box = min(tries, key=lambda found: found[:2])
        boxes.append(box)
        for *_, text, _ in tries:
            if text is not kept:
                text.remove()


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """Training loss of all finished runs.

    Returns:
        False if none has finished.
    """
    runs = [row for row in rows if row.curve]
    if not runs:
        return False

    def fill(_: Any, panels: list[Any]) -> None:
        (axes,) = panels
        looks = itertools.product(("-", "--", ":", "-."), COLOURS)
        for row, (line, colour) in zip(runs, looks, strict=False):
            tokens, losses = zip(*row.curve, strict=True)
            axes.plot(
                [n / 1e6 for n in tokens], smoothed(losses), line, color=colour, linewidth=1.2,
                label=f"{row.label}, seed {row.seed}: {row.loss:.4f}",
            )  # fmt: skip
        axes.set(
            title="Training loss (mean of 5 log entries); with the validation loss at the end",
            xlabel="tokens (millions)",
            ylabel="cross-entropy (nats per token)",
        )
        if min(loss for row in runs for _, loss in row.curve) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(axis="y", alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))

    save(path, 1, (12.5, 6.5), fill)
    return True
