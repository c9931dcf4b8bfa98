# SPDX-License-Identifier: Apache-2.0
"""The sections of the page about losses and traffic."""

from collections.abc import Sequence

import report_pictures as pictures
from mapl.traffic import KINDS
from report_runs import Curve, Recorded, Run, sent, smoothed
from report_sections import Section, Table, names_without, panel
from report_text import Unit, unit_of


def losses(runs: Sequence[Recorded]) -> Section | None:
    """Training and validation losses side by side."""
    known = [recorded for recorded in runs if recorded.run.losses or recorded.run.validation]
    if not known:
        return None
    trained = [r.run for r in known if r.run.losses]
    common = min((run.losses[-1][0] for run in trained), default=0)
    compares = len(trained) > 1
    names = ["run", "last step", "first loss", "last loss"]
    names += [f"loss at step {common:,}"] * compares + ["validation loss", "at step"]
    rows = [_loss_row(recorded.run, common if compares else None) for recorded in known]
    ends = "; ".join(
        f"{run.name} from {run.losses[0][1]:.3f} to {_last(run.losses):.3f} at step "
        f"{run.losses[-1][0]:,}"
        for run in trained
    )
    shown = [recorded.run for recorded in runs]
    picture = panel("losses", f"Loss by step. {ends}.", lambda a: pictures.draw_losses(a, shown))
    text = (
        "Cross-entropy in nats a token. Faint lines are what was logged, strong ones the mean of "
        "the last five, as are the last loss and the loss at a step; dots are validation losses."
    )
    return Section(
        "losses", "Losses", text, names_without(runs, known), [picture],
        [Table("Losses of each run", names, rows)],
    )  # fmt: skip


def _loss_row(run: Run, common: int | None) -> list[str]:
    row = [run.name, "–", "–", "–"]
    if run.losses:
        row[1:] = [f"{run.losses[-1][0]:,}", f"{run.losses[0][1]:.4f}", f"{_last(run.losses):.4f}"]
    if common is not None:
        known = [point for point in run.losses if point[0] <= common]
        row.append(f"{_last(known):.4f}" if known else "–")
    if run.validation:
        step, loss = run.validation[-1]
        return [*row, f"{loss:.4f}", f"{step:,}"]
    return [*row, "–", "–"]


def _last(curve: Curve) -> float:
    """The mean of the last five losses."""
    return smoothed([loss for _, loss in curve])[-1]


def traffic(runs: Sequence[Recorded]) -> Section | None:
    """Bytes by direction, by kind and by boundary."""
    counted = [recorded for recorded in runs if recorded.run.traffic]
    if not counted:
        return None
    unit = unit_of([r.run.traffic.total for r in counted if r.run.traffic])
    plain = unit_of([r.run.uncompressed.total for r in counted if r.run.uncompressed])
    told = "; ".join(
        f"{r.run.name} {unit.text(r.run.traffic.total)} {unit.name}, {r.run.ratio:.2f} times less "
        "than uncompressed"
        for r in counted
        if r.run.traffic
    )
    all_runs = [recorded.run for recorded in runs]
    colours = pictures.colours(all_runs)
    see = "bars for each run; the table has the figures."
    drawn = [
        panel("traffic", f"Traffic by direction. {told}.",
              lambda axes: pictures.draw_traffic(axes, all_runs)),
        panel("traffic-by-kind", f"Traffic by kind, {see}",
              lambda axes: pictures.draw_kinds(axes, counted, unit), rows=len(counted)),
        panel("traffic-by-boundary", f"Traffic by boundary, {see}",
              lambda axes: pictures.draw_boundaries(axes, counted, colours, unit)),
    ]  # fmt: skip
    text = (
        "All bytes that crossed the boundaries between stages, both directions, headers and the "
        "projector's exchange included, beside what plain Megatron would have sent for the same "
        "micro-batches. The ratio is of these two."
    )
    uncompressed = f"uncompressed {plain.name}"
    directions = ["forward", "backward", "projector"]
    tables = [
        Table(f"Traffic by kind, {unit.name}", ["run", *KINDS, "total", uncompressed, "ratio"],
              [_kind_row(recorded, unit, plain) for recorded in counted]),
        Table(f"Traffic by boundary, {unit.name}",
              ["run", "boundary", *directions, "total", uncompressed, "ratio"],
              [row for recorded in counted for row in _boundary_rows(recorded, unit, plain)],
              headings=2),
    ]  # fmt: skip
    without = names_without(runs, counted)
    return Section("traffic", "Traffic", text, without, drawn, tables)


def _kind_row(recorded: Recorded, unit: Unit, plain: Unit) -> list[str]:
    run = recorded.run
    assert run.traffic is not None and run.uncompressed is not None
    sums = [
        sum(of_kind[kind] for entry in recorded.boundaries for of_kind in sent(entry).values())
        for kind in KINDS
    ]
    total = plain.text(run.uncompressed.total)
    return [run.name, *map(unit.text, (*sums, run.traffic.total)), total, f"{run.ratio:.2f}×"]


def _boundary_rows(recorded: Recorded, unit: Unit, plain: Unit) -> list[list[str]]:
    rows = []
    for entry in recorded.boundaries:
        sums = [sum(of_kind.values()) for of_kind in sent(entry).values()]
        ratio = f"{entry['uncompressed'] / sum(sums):.2f}×" if sum(sums) else "–"
        texts = [*map(unit.text, (*sums, sum(sums))), plain.text(entry["uncompressed"]), ratio]
        rows.append([recorded.run.name, str(entry["boundary"]), *texts])
    return rows
