# SPDX-License-Identifier: Apache-2.0
"""The sections of the page about time, projectors and codebooks, over training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import PercentFormatter

import report_pictures as pictures
from figures import plain
from report_curves import Pen, draw_curves, legend, pens, spoken
from report_runs import Recorded
from report_sections import Picture, Section, Table, names_without, panel
from report_series import Series
from report_text import figure

# A run, its series, and how it is drawn.
type Drawn = Sequence[tuple[Recorded, Series, Pen]]


@dataclass(frozen=True)
class _Kind:
    """How a series is shown.

    Attributes:
        series: its name in `report_series`.
        title: of the picture.
        column: of the table.
        what: a curve belongs to.
        form: of its numbers, a format specification.
        limits: of the axis; None for what fits.
    """

    series: str
    title: str
    column: str
    what: str
    form: str
    limits: tuple[float | None, float | None] = (None, None)
    logarithmic: bool = False


_ENERGY = _Kind("energy", "Energy kept", "energy kept", "boundary", ".3f", (0, 1.02))
_ORTHONORMALITY = _Kind(
    "orthonormality", "max |AᵀA − I|", "max |AᵀA − I|", "boundary", ".1e", logarithmic=True
)
_ANGLE = _Kind("angle", "Mean principal angle, degrees", "mean °", "boundaries", ".2f", (0, None))
_PERPLEXITY = _Kind(
    "perplexity", "Perplexity of the codebooks", "perplexity", "boundary", ".1f", (0, None)
)
_DEAD = _Kind("dead", "Share of dead codes", "dead codes", "boundary", ".1%", (0, None))
_COMMUNICATION = _Kind(
    "communication", "Share of the time in communication", "share", "all", ".1%", (0, 1.02)
)


def time(runs: Sequence[Recorded]) -> Section | None:
    """Time on the wire."""
    known = [r for r in runs if r.run.seconds is not None and r.run.communicating is not None]
    over_training = _drawn(runs, _COMMUNICATION)
    if not known and not over_training:
        return None
    rows = [
        [
            recorded.run.name,
            figure(recorded.run.seconds, ",.1f"),
            figure(recorded.run.communicating, ",.1f"),
            figure(recorded.most_communicating, ",.1f"),
            figure(_share(recorded), ".1%"),
        ]
        for recorded in known
    ]
    told = "; ".join(f"{row[0]} {row[2]} of {row[1]} seconds in communication" for row in rows)
    drawn = []
    if known:
        drawn.append(
            panel("time", f"Time by run. {told}.",
                  lambda axes: pictures.draw_time(axes, [r.run for r in known]), rows=len(known))
        )  # fmt: skip
    if over_training:
        drawn.append(_picture("time-over-training", _COMMUNICATION, over_training))
    text = (
        "Seconds after the first step, evaluations and saves included. Communication is what a "
        "process spends in exchanges with its neighbours and in waiting for them, which the "
        "pipeline's bubble is part of: mean over processes, and of the one with the most."
    )
    names = ["run", "training s", "communication s", "the most s", "share"]
    tables = [Table("Time of each run", names, rows)] if rows else []
    with_data = known + [r for r, *_ in over_training if r not in known]
    return Section("time", "Time on the wire", text, names_without(runs, with_data), drawn, tables)


def _share(recorded: Recorded) -> float | None:
    run = recorded.run
    return (
        run.communicating / run.seconds if run.seconds and run.communicating is not None else None
    )


def energy(runs: Sequence[Recorded]) -> Section | None:
    """How much of the activations the projectors keep."""
    text = (
        "The part of ‖X − anchor‖² that crosses a boundary, of the last micro-batch of the step. "
        "Energy is not the objective: a projector that keeps more need not train better."
    )
    return _section(runs, "energy", "Energy kept", text, [_ENERGY])


def orthogonality(runs: Sequence[Recorded]) -> Section | None:
    """How far the projectors are from orthonormal columns."""
    text = (
        "The largest entry of |AᵀA − I| of each projector A, and the steps that projectors were "
        "left out of because their gradient was not finite."
    )
    return _section(
        runs, "orthogonality", "Orthogonality", text, [_ORTHONORMALITY],
        more=[_Kind("skipped", "Skipped steps", "skipped steps", "boundary", ".0f")],
    )  # fmt: skip


def angles(runs: Sequence[Recorded]) -> Section | None:
    """How the projectors of neighbouring boundaries differ."""
    text = (
        "Principal angles between the projectors of neighbouring boundaries: 0° if both span one "
        "subspace, 90° if theirs have nothing in common. Known of stages with a "
        "projector at both their ends."
    )
    return _section(
        runs, "angles", "Angles between neighbours", text, [_ANGLE],
        more=[_Kind("smallest angle", "Smallest angle", "smallest °", "boundaries", ".2f")],
    )  # fmt: skip


def codebooks(runs: Sequence[Recorded]) -> Section | None:
    """How evenly the codes of rvq are used."""
    text = (
        "Perplexity is the number of codes that would be used as evenly: that of a codebook's "
        "usage, mean over the codebooks of a boundary and direction. Dead codes are hardly used "
        "and are revived."
    )
    return _section(runs, "codebooks", "Codebook use", text, [_PERPLEXITY, _DEAD])


def _section(
    runs: Sequence[Recorded],
    key: str,
    title: str,
    text: str,
    kinds: Sequence[_Kind],
    more: Sequence[_Kind] = (),
) -> Section | None:
    """Pictures of `kinds`, and a table of these and `more`, of the runs that have the first."""
    drawn = _drawn(runs, kinds[0])
    if not drawn:
        return None
    columns = [*kinds, *more]
    rows = []
    for recorded, series, _ in drawn:
        for place in series.curves:
            last = [_last(recorded.series.get(kind.series), place) for kind in columns]
            values = [figure(v, kind.form) for v, kind in zip(last, columns, strict=True)]
            rows.append([recorded.run.name, spoken(place), f"{series.steps[-1]:,}", *values])
    names = ["run", kinds[0].what, "step", *(kind.column for kind in columns)]
    shown = [_picture(kind.series, kind, _drawn(runs, kind)) for kind in kinds]
    known = [recorded for recorded, *_ in drawn]
    tables = [Table(f"{title} at the last step", names, rows, headings=2)]
    return Section(key, title, text, names_without(runs, known), shown, tables)


def _last(series: Series | None, place: Any) -> float | None:
    return series.curves[place][-1] if series and place in series.curves else None


def _drawn(runs: Sequence[Recorded], kind: _Kind) -> Drawn:
    places = [place for place, run in enumerate(runs) if kind.series in run.series]
    known = pens([runs[place] for place in places], places)
    return [(recorded, recorded.series[kind.series], pen) for recorded, pen in known]


def _picture(name: str, kind: _Kind, drawn: Drawn) -> Picture:
    told = []
    for recorded, series, _ in drawn:
        last = [c[-1] for c in series.curves.values() if not math.isnan(c[-1])]
        if last:
            ends = dict.fromkeys(format(v, kind.form) for v in (min(last), max(last)))
            told.append(f"{recorded.run.name} {' to '.join(ends)} at step {series.steps[-1]:,}")
    return panel(name, f"{kind.title} by step. {'; '.join(told)}.", _drawing(kind, drawn))


def _drawing(kind: _Kind, drawn: Drawn) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for recorded, series, pen in drawn:
            name = recorded.run.name
            label = plain(name) if kind.what == "all" else legend(name, series.curves, kind.what)
            draw_curves(axes, series.steps, series.curves, pen, label=label)
        axes.set(title=kind.title, xlabel="step")
        if kind.logarithmic and any(
            v > 0 for _, s, _ in drawn for c in s.curves.values() for v in c
        ):
            axes.set_yscale("log")
        else:
            axes.set_ylim(*kind.limits)
        if kind.form.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", alpha=0.25)

    return draw
