# SPDX-License-Identifier: Apache-2.0
"""Draw a sweep: loss against traffic with the Pareto front, and the losses while training."""

import dataclasses
import itertools
from collections.abc import Sequence
from math import hypot, inf
from pathlib import Path
from statistics import quantiles
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from figures import COLOURS, picture, save
from report_runs import smoothed
from sweep_results import Row, front, means

_MARKER_SIZE = 7  # points
_MARKERS = ("o", "s", "^", "D")
#: Of the runs of one group, by turns: matplotlib's own, then a dash and two dots, and long dashes.
_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 4)))


#: Setting → tokens and what is drawn at them.
type _Curves = dict[str, list[tuple[int, float]]]


def _group(row: Row) -> str:
    """What is drawn alike: settings of one group, and what the others are compared with."""
    return "uncompressed" if row.uncompressed else row.group or "compressed"


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each group; black for what the others are compared with."""
    groups = dict.fromkeys(_group(row) for row in rows if not row.uncompressed)
    looks = ((colour, marker) for marker in _MARKERS for colour in COLOURS[:-1])
    return {"uncompressed": (COLOURS[-1], "o"), **dict(zip(groups, looks, strict=False))}


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


def within_reach(rows: Sequence[Row]) -> list[Row]:
    """The rows as drawn: one that would flatten the rest comes down to above them, and says it."""
    ceiling = _ceiling(rows)
    others = [row.gap for row in rows if row.gap is not None and row.gap <= ceiling]
    highest, lowest = max(others, default=0.0), min(others, default=0.0)
    above = highest + max(0.1 * (highest - lowest), 0.5)
    return [
        dataclasses.replace(
            row, gap=above, gap_spread=None, label=f"{row.label}: {row.gap:+.0f}% ↑"
        )
        if row.gap is not None and row.gap > ceiling
        else row
        for row in rows
    ]


def _ceiling(rows: Sequence[Row]) -> float:
    """The gap above which a row would flatten the rest: 5%, or 3 times the upper quartile."""
    gaps = [row.gap for row in rows if row.gap is not None]
    return inf if len(gaps) < 2 else max(5.0, 3 * quantiles(gaps, method="inclusive")[2])


def _draw_front(figure: Any, axes: Any, rows: Sequence[Row], tokens: int) -> None:
    on_front = front(rows)
    rows = within_reach(rows)
    looks = _looks(rows)
    for place, (group, (colour, marker)) in enumerate(looks.items()):
        own = [row for row in rows if _group(row) == group]
        axes.errorbar(
            [row.ratio for row in own], [row.gap for row in own],
            yerr=[row.gap_spread or 0.0 for row in own], fmt=marker, color=colour,
            markersize=_MARKER_SIZE, markeredgecolor="white", elinewidth=1.5, label=group,
            zorder=2 + len(looks) - place,  # a list begins with what it is about
        )  # fmt: skip
    # Between two of its settings the cheaper one's loss is not to be had: the step goes up first.
    drawn = {row.setting: row for row in rows}
    best = [drawn[row.setting] for row in on_front]
    (line,) = axes.plot(
        [row.ratio for row in best], [row.gap for row in best], drawstyle="steps-pre",
        color="grey", linewidth=1.2, zorder=1, label="front",
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
    axes.legend(frameon=False, loc="best")
    _label(figure, axes, rows, line)


def _label(figure: Any, axes: Any, rows: Sequence[Row], line: Any) -> None:
    """Names each point where its name covers least, and stands next to no other point."""
    figure.canvas.draw()
    front_line = line.get_path().transformed(line.get_transform())
    legend = axes.get_legend().get_window_extent()
    places = [(7, 5, "left"), (7, -12, "left"), (-7, 5, "right"), (-7, -12, "right"),
              (0, 12, "center"), (0, -20, "center")]  # fmt: skip
    points = [axes.transData.transform((row.ratio, row.gap)) for row in rows]
    radius = _MARKER_SIZE / 2 * figure.dpi / 72
    boxes: list[Any] = []
    looks = _looks(rows)
    for row, own in zip(rows, points, strict=True):
        tries: list[tuple[int, int, Any, Any]] = []
        for x, y, side in places:
            text = axes.annotate(
                row.label, (row.ratio, row.gap), (x, y), textcoords="offset points", ha=side,
                fontsize=8.5, color=looks[_group(row)][0],
            )  # fmt: skip
            box = text.get_window_extent()
            covered = sum(box.overlaps(other) for other in boxes)
            away = [_distance(box, point) for point in points]
            covered += sum(distance < radius for distance in away)
            covered += min(away) < _distance(box, own)
            covered += front_line.intersects_bbox(box, filled=False)
            covered += box.overlaps(legend)
            covered += not (axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1)
            tries.append((covered, len(tries), text, box))
        *_, kept, box = min(tries, key=lambda found: found[:2])
        boxes.append(box)
        for *_, text, _ in tries:
            if text is not kept:
                text.remove()


def _distance(box: Any, point: Sequence[float]) -> float:
    x, y = point
    return hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """Training loss of the finished runs, of each setting its first seed, and how far each is above
    the uncompressed run of its length and seed meanwhile, where there is one.

    Returns:
        False if none has finished.
    """
    runs = list({row.setting: row for row in reversed(rows) if row.curve}.values())[::-1]
    if not runs:
        return False
    gaps = {row.setting: own for row in runs if (own := gaps_while_training(row, rows))}
    looks = _looks(runs)
    lines = {group: itertools.cycle(_LINES) for group in looks}
    pens = {
        row.setting: {"color": looks[_group(row)][0], "linestyle": next(lines[_group(row)]),
                      "linewidth": 1.3, "label": _legend(row)}
        for row in runs
    }  # fmt: skip
    ceiling = _ceiling(runs)
    reachable = {row.setting for row in runs if row.gap is None or row.gap <= ceiling}
    panels = 2 if gaps else 1
    with picture(path, figsize=(13, 6 * panels)) as figure:
        first, *others = figure.subplots(panels, 1, squeeze=False)[:, 0]
        losses = {row.setting: _smoothed(row) for row in runs}
        _draw_curves(first, losses, pens, reachable)
        first.set(title="Training loss (mean of 5 log entries), and validation loss at the end",
                  ylabel="cross-entropy (nats per token)")  # fmt: skip
        first.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        for axes in others:
            _draw_curves(axes, gaps, pens, reachable, zero=True)
            axes.set(title="Training loss above the uncompressed run's", ylabel="%")
    return True


def _legend(row: Row) -> str:
    group = "" if row.uncompressed or not row.group else f"{row.group}: "
    return f"{group}{row.label}: {row.loss:.4f}"


def _smoothed(row: Row) -> list[tuple[int, float]]:
    tokens, losses = zip(*row.curve, strict=True)
    return list(zip(tokens, smoothed(losses), strict=True))


def gaps_while_training(row: Row, rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Tokens, and the run's training loss above that of its uncompressed run, in percent.

    Both saw the same samples by then, so what one batch has in common with the other cancels. Of
    the log entries that both have, since a stop may have cost either one; means of five.
    """
    if row.uncompressed:
        return []
    base = {
        tokens: loss
        for other in rows
        if other.uncompressed and (other.tokens, other.seed) == (row.tokens, row.seed)
        for tokens, loss in other.curve
    }
    shared = [tokens for tokens, _ in row.curve if tokens in base]
    own = dict(row.curve)
    pairs = zip(
        smoothed([own[tokens] for tokens in shared]),
        smoothed([base[tokens] for tokens in shared]),
        strict=True,
    )
    return [(n, 100 * (a / b - 1)) for n, (a, b) in zip(shared, pairs, strict=True)]


def _draw_curves(
    axes: Any,
    curves: _Curves,
    pens: dict[str, dict[str, Any]],
    reachable: set[str],
    *,
    zero: bool = False,
) -> None:
    """The axis fits the second half of the curves within reach: others would flatten these.

    Args:
        zero: whether it has zero, with a line there.
    """
    for setting, curve in curves.items():
        axes.plot([n / 1e6 for n, _ in curve], [value for _, value in curve], **pens[setting])
    shown = [curve for setting, curve in curves.items() if setting in reachable]
    late = [value for curve in shown or curves.values() for _, value in curve[len(curve) // 2 :]]
    if zero:
        axes.axhline(0, color=COLOURS[-1], linewidth=0.8)
        late.append(0.0)
    margin = 0.1 * (max(late) - min(late)) + 1e-3
    axes.set(xlabel="tokens (millions)", ylim=(min(late) - margin, max(late) + margin))
    axes.grid(axis="y", alpha=0.25)
