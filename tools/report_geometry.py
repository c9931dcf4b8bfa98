# SPDX-License-Identifier: Apache-2.0
"""The picture of report.py --geometry: what projectors keep, and how boundaries differ."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import COLOURS, picture
from mapl.files import METRICS_FILE
from report_files import ReportError, metrics_lines

_GREY = "#666666"


@dataclass(frozen=True)
class _Pen:
    """How a run is drawn."""

    colour: str
    width: float


# boundary → its value at each step that was measured, NaN where there is none
Curves = dict[int, list[float]]


@dataclass(frozen=True)
class Measured:
    """The geometry of one run.

    Attributes:
        name: for the legend.
        steps: that were measured.
        kept, ceiling, random: parts of the energy, see `mapl.geometry.Geometry`.
        rank_99: dimensions.
        pearson: of cosines before and after projection.
        ranks: boundary → r.
        angles: (p, q) → mean principal angle at the last step, degrees.
    """

    name: str
    steps: list[int]
    kept: Curves
    ceiling: Curves
    random: Curves
    rank_99: Curves
    pearson: Curves
    ranks: dict[int, int]
    angles: dict[tuple[int, int], float]


def load(directory: Path) -> Measured:
    """Read the geometry of one run report.

    Raises:
        ReportError: the report is missing or damaged, or nothing was measured.
    """
    path = directory / METRICS_FILE
    try:
        lines = [line for line in metrics_lines(path) if "geometry" in line]
        if not lines:
            raise ReportError(
                f"{path} has no line with geometry; train with --mapl-geometry-interval, or leave "
                "--geometry out"
            )
        measured = [
            {entry["boundary"]: entry for entry in line["geometry"]["boundaries"]} for line in lines
        ]

        def curves(name: str) -> Curves:
            return {
                # A run that was resumed in another pipeline had other boundaries before.
                boundary: [_number(e[boundary][name] if boundary in e else None) for e in measured]
                for boundary in measured[-1]
            }

        return Measured(
            name=directory.name or str(directory),
            steps=[int(line["iteration"]) for line in lines],
            kept=curves("energy_kept"),
            ceiling=curves("energy_ceiling"),
            random=curves("energy_random"),
            rank_99=curves("rank_99"),
            pearson=curves("cosine_pearson"),
            ranks={boundary: entry["rank"] for boundary, entry in measured[-1].items()},
            angles={
                (entry["boundaries"][0], entry["boundaries"][1]): float(entry["mean_degrees"])
                for entry in lines[-1]["geometry"]["angles"]
            },
        )
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; a run with --mapl-rank writes it") from None
    except ReportError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReportError(f"{path} has no geometry that can be read: {error!r}") from None


def draw(runs: Sequence[Measured], path: Path) -> None:
    """Energy, Pearson and rank over training, and a map of angles for each run."""
    columns = 2 if len(runs) == 1 else 3
    rows = math.ceil((3 + len(runs)) / columns)
    with picture(path, figsize=(5.2 * columns, 4.3 * rows)) as figure:
        energy, pearson, rank, *others = figure.subplots(rows, columns, squeeze=False).flat
        _draw_energy(energy, runs)
        _draw_pearson(pearson, runs)
        _draw_rank(rank, runs)
        maps, unused = others[: len(runs)], others[len(runs) :]
        for axes, run in zip(maps, runs, strict=True):
            _draw_angles(axes, run, of_several=len(runs) > 1)
        for axes in unused:
            axes.set_axis_off()
        handles, labels = energy.get_legend_handles_labels()
        if unused:
            unused[0].legend(handles, labels, loc="center left", frameon=False)
        else:
            figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _draw_energy(axes: Any, runs: Sequence[Measured]) -> None:
    for run, pen in _pens(runs):
        _draw_curves(axes, run.steps, run.kept, pen, label=_title(run))
        label = f"{run.name}, the best subspaces of rank r"
        _draw_curves(axes, run.steps, run.ceiling, pen, label=label, style=":")
    levels = sorted({level[-1] for run in runs for level in run.random.values()})
    for level in levels:
        axes.axhline(level, color=_GREY, linestyle="--", linewidth=1, zorder=1)
    label = f"random subspaces, r/d = {', '.join(f'{level:.3g}' for level in levels)}"
    axes.plot([], [], color=_GREY, linestyle="--", linewidth=1, label=label)
    axes.set(title="Energy kept of X − anchor", xlabel="step", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.25)


def _draw_pearson(axes: Any, runs: Sequence[Measured]) -> None:
    for run, pen in _pens(runs):
        _draw_curves(axes, run.steps, run.pearson, pen)
    axes.set(title="Pairwise cosines of tokens, before and after", xlabel="step")
    axes.set_ylabel("Pearson correlation")
    axes.set_ylim(top=1.0 + 0.02 * (1.0 - axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.25)


def _draw_rank(axes: Any, runs: Sequence[Measured]) -> None:
    for run, pen in _pens(runs):
        _draw_curves(axes, run.steps, run.rank_99, pen)
    for r in sorted({r for run in runs for r in run.ranks.values()}):
        axes.axhline(r, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate(f"r = {r}", (1, r), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", fontsize=9, color=_GREY)  # fmt: skip
    axes.set(title="Rank that holds 99% of the energy", xlabel="step", ylabel="dimensions")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)


def _draw_angles(axes: Any, run: Measured, *, of_several: bool) -> None:
    boundaries = sorted(run.ranks)
    table = [
        [run.angles.get((min(p, q), max(p, q)), math.nan) for q in boundaries] for p in boundaries
    ]
    image = axes.imshow(table, vmin=0, vmax=90, cmap="viridis")
    if len(boundaries) <= 10:
        for (y, row), x in itertools.product(enumerate(table), range(len(boundaries))):
            if not math.isnan(row[x]):
                colour = "black" if row[x] > 55 else "white"  # on yellow, on blue
                axes.text(
                    x,
                    y,
                    f"{row[x]:.{0 if row[x] >= 10 else 1}f}°",
                    ha="center",
                    va="center",
                    color=colour,
                )
    axes.set_xticks(range(len(boundaries)), boundaries)
    axes.set_yticks(range(len(boundaries)), boundaries)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    title = f"Mean principal angle, step {run.steps[-1]}"
    axes.set(title=f"{title}\n{run.name}" if of_several else title)
    axes.set(xlabel="boundary", ylabel="boundary")
    if run.angles:
        axes.figure.colorbar(image, ax=axes, ticks=[0, 30, 60, 90], format="%d°", shrink=0.8)
    else:
        axes.text(0, 0, "one boundary alone", ha="center", va="center")


def _draw_curves(
    axes: Any,
    steps: list[int],
    curves: Curves,
    pen: _Pen,
    *,
    label: str | None = None,
    style: str = "o-",
) -> None:
    """One line a boundary, from the pen's colour itself to a light shade of it."""
    for index, boundary in enumerate(sorted(curves)):
        axes.plot(
            steps, curves[boundary], style, color=_shade(pen.colour, index, len(curves)),
            linewidth=pen.width, markersize=2 * pen.width, label=label if index == 0 else None,
        )  # fmt: skip


def _pens(runs: Sequence[Measured]) -> list[tuple[Measured, _Pen]]:
    """Earlier runs are drawn broader, so that they show under later ones of equal values."""
    widths = (1.5 + 1.5 * place for place in reversed(range(len(runs))))
    pens = map(_Pen, itertools.cycle(COLOURS), widths)
    return list(zip(runs, pens, strict=True))


def _shade(colour: str, index: int, count: int) -> tuple[float, ...]:
    white = 0.65 * index / max(1, count - 1)
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return tuple(channel + (1 - channel) * white for channel in channels)


def _title(run: Measured) -> str:
    first, *more = sorted(run.kept)
    return f"{run.name}, boundary {first}" + (f" (dark) to {more[-1]} (light)" if more else "")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
