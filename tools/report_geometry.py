# SPDX-License-Identifier: Apache-2.0
"""The picture of report.py --geometry: what projectors keep, and how boundaries differ."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import picture, plain
from mapl.files import METRICS_FILE
from report_curves import Curves, Pen, draw_curves, legend, number, pens
from report_files import ReportError, metrics_lines

_GREY = "#666666"


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


# Runs, and how each is drawn.
type Drawn = Sequence[tuple[Measured, Pen]]


def load(directory: Path, name: str) -> Measured:
    """Read the geometry of one run report.

    Args:
        directory: of the report.
        name: of the run.

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
                boundary: [number(e[boundary][name] if boundary in e else None) for e in measured]
                for boundary in measured[-1]
            }

        return Measured(
            name=name,
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
    drawn = pens(runs)
    with picture(path, figsize=(5.2 * columns, 4.3 * rows)) as figure:
        energy, pearson, rank, *others = figure.subplots(rows, columns, squeeze=False).flat
        draw_energy(energy, drawn)
        draw_pearson(pearson, drawn)
        draw_rank(rank, drawn)
        maps, unused = others[: len(runs)], others[len(runs) :]
        for axes, run in zip(maps, runs, strict=True):
            draw_angles(axes, run, of_several=len(runs) > 1)
        for axes in unused:
            axes.set_axis_off()
        handles, labels = energy.get_legend_handles_labels()
        if unused:
            unused[0].legend(handles, labels, loc="center left", frameon=False)
        else:
            figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def draw_energy(axes: Any, drawn: Drawn) -> None:
    for run, pen in drawn:
        draw_curves(axes, run.steps, run.kept, pen, label=legend(run.name, run.kept))
        label = f"{plain(run.name)}, the best subspaces of rank r"
        draw_curves(axes, run.steps, run.ceiling, pen, label=label, style=":")
    levels = sorted({level[-1] for run, _ in drawn for level in run.random.values()})
    for level in levels:
        axes.axhline(level, color=_GREY, linestyle="--", linewidth=1, zorder=1)
    label = f"random subspaces, r/d = {', '.join(f'{level:.3g}' for level in levels)}"
    axes.plot([], [], color=_GREY, linestyle="--", linewidth=1, label=label)
    axes.set(title="Energy kept of X − anchor", xlabel="step", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.25)


def draw_pearson(axes: Any, drawn: Drawn) -> None:
    for run, pen in drawn:
        draw_curves(axes, run.steps, run.pearson, pen)
    axes.set(title="Pairwise cosines of tokens, before and after", xlabel="step")
    axes.set_ylabel("Pearson correlation")
    axes.set_ylim(top=1.0 + 0.02 * (1.0 - axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.25)


def draw_rank(axes: Any, drawn: Drawn) -> None:
    for run, pen in drawn:
        draw_curves(axes, run.steps, run.rank_99, pen)
    for r in sorted({r for run, _ in drawn for r in run.ranks.values()}):
        axes.axhline(r, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate(f"r = {r}", (1, r), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", fontsize=9, color=_GREY)  # fmt: skip
    axes.set(title="Rank that holds 99% of the energy", xlabel="step", ylabel="dimensions")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)


def draw_angles(axes: Any, run: Measured, *, of_several: bool) -> None:
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
    axes.set(title=f"{title}\n{plain(run.name)}" if of_several else title)
    axes.set(xlabel="boundary", ylabel="boundary")
    if run.angles:
        axes.figure.colorbar(image, ax=axes, ticks=[0, 30, 60, 90], format="%d°", shrink=0.8)
    else:
        axes.text(0, 0, "one boundary alone", ha="center", va="center")
