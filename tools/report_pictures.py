# SPDX-License-Identifier: Apache-2.0
"""Losses, traffic and time of several runs, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import COLOURS, colour, plain, save
from mapl.traffic import KINDS
from report_runs import Recorded, Run, sent, smoothed
from report_text import Unit, unit_of

# Up to so many runs have their figures above their bars.
_LABELLED = 4


def draw(runs: Sequence[Run], path: Path) -> None:
    """Losses left, what traffic was counted right; written whole or not at all."""
    counted = any(run.traffic for run in runs)

    def fill(_: Any, panels: list[Any]) -> None:
        draw_losses(panels[0], runs)
        if counted:
            draw_traffic(panels[1], runs)

    save(path, 1 + counted, (6.25 * (1 + counted), 5), fill)


def draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    """Each line of the log faintly, the mean of the last five, and validation losses."""
    for run, own in _coloured(runs):
        if run.losses:
            steps, losses = zip(*run.losses, strict=True)
            axes.plot(steps, losses, color=own, alpha=0.25, linewidth=0.8)
            label = plain(run.name)
            axes.plot(steps, smoothed(losses), color=own, linewidth=1.8, label=label)
        if run.validation:
            label = f"{plain(run.name)}, validation: {run.validation[-1][1]:.3f} at the end"
            axes.plot(
                *zip(*run.validation, strict=True), "o", color=own, markersize=7,
                markeredgecolor="white", label=label,
            )  # fmt: skip
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(axis="y", alpha=0.25)
    axes.locator_params(axis="x", integer=True)
    if axes.lines:
        axes.legend(frameon=False)


def draw_traffic(axes: Any, runs: Sequence[Run]) -> None:
    """Bars by direction, one for each run that has counted."""
    counted = [(run, run.traffic, own) for run, own in _coloured(runs) if run.traffic]
    unit = unit_of([traffic.total for _, traffic, _ in counted])
    groups = ["forward\n(activations)", "backward\n(gradients)", "projector\nexchange", "total"]
    width = 0.8 / len(counted)
    for index, (run, t, own) in enumerate(counted):
        sizes = [unit.of(n) for n in (t.forward, t.backward, t.projector, t.total)]
        places = [place + (index - (len(counted) - 1) / 2) * width for place in range(len(groups))]
        name = plain(run.name)
        label = name if run.ratio == 1 else f"{name}: {run.ratio:.2f}× less"
        bars = axes.bar(places, sizes, width, color=own, label=label)
        if len(counted) <= _LABELLED:
            labels = [f"{size:,.{1 if 0 < size < 100 else 0}f}" for size in sizes]
            axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title="Traffic over the stage boundaries, whole run", ylabel=unit.spoken)
    axes.legend(frameon=False, loc="upper left")


def draw_kinds(axes: Any, runs: Sequence[Recorded], unit: Unit) -> None:
    """One bar a run, of what its bytes are."""
    sums = [
        [sum(kinds[kind] for b in run.boundaries for kinds in sent(b).values()) for kind in KINDS]
        for run in runs
    ]
    left = [0.0] * len(runs)
    for kind, sizes, shade in zip(KINDS, zip(*sums, strict=True), COLOURS, strict=True):
        if any(sizes):
            widths = [unit.of(size) for size in sizes]
            axes.barh(range(len(runs)), widths, left=left, color=shade, label=kind)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    _name_rows(axes, [run.run.name for run in runs])
    axes.set(title="Traffic by kind", xlabel=unit.spoken)


def draw_boundaries(
    axes: Any, runs: Sequence[Recorded], colours: dict[str, str], unit: Unit
) -> None:
    """Bars by boundary, one for each run."""
    numbers = sorted({entry["boundary"] for run in runs for entry in run.boundaries})
    width = 0.8 / len(runs)
    for index, run in enumerate(runs):
        places = [
            numbers.index(entry["boundary"]) + (index - (len(runs) - 1) / 2) * width
            for entry in run.boundaries
        ]
        sizes = [unit.of(entry["sent"]) for entry in run.boundaries]
        name = run.run.name
        axes.bar(places, sizes, width, color=colours[name], label=plain(name))
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set(title="Traffic by boundary", xlabel="boundary", ylabel=unit.spoken)


def draw_time(axes: Any, runs: Sequence[Run]) -> None:
    """One bar a run: the seconds in communication, and the others."""
    for row, run in enumerate(runs):
        assert run.seconds is not None and run.communicating is not None
        others = run.seconds - run.communicating
        for start, width, shade, label in (
            (0.0, run.communicating, COLOURS[1], "in communication"),
            (run.communicating, others, COLOURS[5], "in all else"),
        ):
            axes.barh(row, width, left=start, color=shade, label=label if row == 0 else None)
    _name_rows(axes, [run.name for run in runs])
    axes.set(title="Time, mean over processes", xlabel="seconds after the first step")


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """Name → the colour that a run has in all pictures."""
    return {run.name: own for run, own in _coloured(runs)}


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, colour(place)) for place, run in enumerate(runs)]


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [plain(_shortened(name)) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _shortened(name: str) -> str:
    """So that a long name leaves room for bars."""
    return name if len(name) <= 20 else f"{name[:9]} … {name[-9:]}"
