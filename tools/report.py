# SPDX-License-Identifier: Apache-2.0
"""Draw what runs with boundaries report: their losses, and the bytes that crossed.

    python tools/report.py RUN_DIR [RUN_DIR ...] --output report.png [--geometry geometry.png]

RUN_DIR is a --mapl-report-dir, with mapl_traffic.json and mapl_metrics.jsonl in it. --geometry
draws what the projectors keep, of runs with --mapl-geometry-interval (docs/geometry.md).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report_geometry
from figures import COLOURS, save
from mapl.files import METRICS_FILE, TRAFFIC_FILE
from mapl.traffic import KINDS
from report_files import ReportError, metrics_lines
from text_table import columns

# (step, loss)
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Traffic:
    """Bytes over all boundaries, each counted once, where it was sent."""

    forward: int
    backward: int
    projector: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.projector


@dataclass(frozen=True)
class Run:
    """One run as it is tabulated and drawn.

    Attributes:
        name: for the legend.
        losses: training loss by step.
        validation: validation loss by step; empty if unknown.
        traffic: what crossed.
        uncompressed: what plain Megatron would have sent for the same micro-batches.
        seconds: wall clock after the first step, or the sum of the steps' times.
        communicating: seconds in communication, waiting for the neighbour included, mean over
            processes; None if unknown.
    """

    name: str
    losses: Curve
    validation: Curve
    traffic: Traffic
    uncompressed: Traffic
    seconds: float
    communicating: float | None = None

    @property
    def ratio(self) -> float:
        return self.uncompressed.total / self.traffic.total


def load(directory: Path) -> Run:
    """Read one run report.

    Raises:
        ReportError: the report is missing or damaged.
    """
    path = directory / TRAFFIC_FILE
    try:
        report = json.loads(path.read_bytes())
        traffic, uncompressed = _traffic(report["boundaries"])
        return Run(
            name=directory.name or str(directory),
            losses=_losses(directory / METRICS_FILE),
            validation=[],
            traffic=traffic,
            uncompressed=uncompressed,
            seconds=report["seconds"]["after_first_step"],
            communicating=report["seconds"]["communication"]["mean"],
        )
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist; it is written when a run with --mapl-rank saves or ends"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} or {METRICS_FILE} beside it is no run report: {error}") from None


def _traffic(boundaries: list[dict[str, Any]]) -> tuple[Traffic, Traffic]:
    """What crossed all boundaries, and what plain Megatron would have sent over them."""
    sent = dict.fromkeys(("forward", "backward", "projector"), 0)
    plain = {"forward": 0, "backward": 0}
    for boundary in boundaries:
        for direction in sent:
            # Whole codebooks, sent now and then, are part of what their direction costs.
            for entry in (boundary.get(direction, {}), boundary.get(f"{direction}_codebook", {})):
                sent[direction] += sum(entry.get(kind, 0) for kind in KINDS)
        # The report has one figure for both directions. Payloads of activations and of gradients
        # stand for tensors of one size, so it divides as their numbers do.
        payloads = {d: boundary.get(d, {}).get("payloads", 0) for d in plain}
        share = payloads["forward"] / max(1, sum(payloads.values()))
        forward = round(boundary["uncompressed"] * share)
        plain["forward"] += forward
        plain["backward"] += boundary["uncompressed"] - forward
    if not sum(sent.values()):
        raise ValueError("no byte crossed a boundary")
    return Traffic(**sent), Traffic(**plain)


def _losses(path: Path) -> Curve:
    return [
        (int(entry["iteration"]), float(entry["loss"]))
        for entry in (metrics_lines(path) if path.exists() else [])
        if entry["loss"] is not None
    ]


def table(runs: Sequence[Run], *, markdown: bool = False) -> str:
    """The runs as aligned text, or as a Markdown table. MB is 10⁶ bytes."""
    names = [
        *("run", "training loss", "validation loss", "forward MB", "backward MB", "projector MB"),
        *("total MB", "ratio", "training s", "communicating s"),
    ]
    rows = []
    for run in runs:
        losses = smoothed([loss for _, loss in run.losses])
        t = run.traffic
        rows.append(
            [
                run.name,
                f"{run.losses[0][1]:.3f} → {losses[-1]:.3f}" if losses else "–",
                f"{run.validation[-1][1]:.4f}" if run.validation else "–",
                *(f"{n / 1e6:,.1f}" for n in (t.forward, t.backward, t.projector, t.total)),
                f"{run.ratio:.2f}×",
                f"{run.seconds:.0f}",
                "–" if run.communicating is None else f"{run.communicating:.0f}",
            ]
        )
    return columns(names, rows, markdown=markdown)


def smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """The mean of each value and the up to `window` − 1 before it."""
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[s:e]) / (e - s) for e, s in enumerate(starts, start=1)]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Losses on the left, traffic on the right, written whole or not at all."""

    def fill(_: Any, panels: list[Any]) -> None:
        _draw_losses(panels[0], runs)
        _draw_traffic(panels[1], runs)

    save(path, 2, (12.5, 5), fill)


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
        if run.losses:
            steps, losses = zip(*run.losses, strict=True)
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=colour, linewidth=1.8, label=run.name)
        if run.validation:
            label = f"{run.name}, validation: {run.validation[-1][1]:.3f} at the end"
            axes.plot(
                *zip(*run.validation, strict=True), "o", color=colour, markersize=7,
                markeredgecolor="white", label=label,
            )  # fmt: skip
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(axis="y", alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)


def _draw_traffic(axes: Any, runs: Sequence[Run]) -> None:
    groups = ["forward\n(activations)", "backward\n(gradients)", "projector\nexchange", "total"]
    width = 0.8 / len(runs)
    for index, (run, colour) in enumerate(zip(runs, itertools.cycle(COLOURS), strict=False)):
        t = run.traffic
        sizes = [n / 1e6 for n in (t.forward, t.backward, t.projector, t.total)]
        places = [place + (index - (len(runs) - 1) / 2) * width for place in range(len(groups))]
        label = run.name if run.ratio == 1 else f"{run.name}: {run.ratio:.2f}× less"
        bars = axes.bar(places, sizes, width, color=colour, label=label)
        labels = [f"{size:,.{1 if 0 < size < 100 else 0}f}" for size in sizes]
        axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title="Traffic over the stage boundaries, whole run", ylabel="MB (10⁶ bytes)")
    axes.legend(frameon=False, loc="upper left")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture; a fault is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output", type=Path, default=Path("report.png"), help="default: %(default)s"
    )
    parser.add_argument(
        "--geometry", type=Path, help="a second picture, of the projectors; default: none"
    )
    options = parser.parse_args(argv)
    try:
        runs = [load(directory) for directory in options.directories]
        measured = [
            report_geometry.load(directory) for directory in options.directories if options.geometry
        ]
        print(table(runs))
        draw(runs, options.output)
        if measured:
            report_geometry.draw(measured, options.geometry)
    except (ReportError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    drawn = [str(path) for path in (options.output, options.geometry) if path]
    print(f"drawn in {' and '.join(drawn)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
