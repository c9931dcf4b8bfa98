# SPDX-License-Identifier: Apache-2.0
"""Runs as report.py compares them: their losses, and what they sent."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapl.files import METRICS_FILE, TRAFFIC_FILE
from mapl.traffic import KINDS
from report_files import ReportError, damaged_line, event_losses, metrics_lines
from report_series import Series, read_series
from text_table import columns
from training_log import TrainingLog

# What reading raises if a file is not what a run writes.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)

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
        traffic: what crossed; None if nothing was counted.
        uncompressed: what plain Megatron would have sent for the same micro-batches.
        seconds: wall clock after the first step, or the sum of the steps' times; None if unknown.
        communicating: seconds in communication, waiting for the neighbour included, mean over
            processes; None if unknown.
    """

    name: str
    losses: Curve
    validation: Curve
    traffic: Traffic | None = None
    uncompressed: Traffic | None = None
    seconds: float | None = None
    communicating: float | None = None

    @property
    def ratio(self) -> float:
        """How many times less crossed than plain Megatron would have sent."""
        assert self.traffic is not None and self.uncompressed is not None
        return self.uncompressed.total / self.traffic.total


@dataclass(frozen=True)
class Recorded:
    """A run with the rest of what it reported.

    Attributes:
        run: what is compared.
        boundaries: those of mapl_traffic.json; empty if there is none.
        most_communicating: seconds in communication of the process with the most; None if unknown.
        series: name → what mapl_metrics.jsonl tells over training, see `report_series`.
        has_geometry: whether it tells of geometry, see `report_geometry`.
    """

    run: Run
    boundaries: list[dict[str, Any]]
    most_communicating: float | None
    series: dict[str, Series]
    has_geometry: bool = False


def load_all(paths: Sequence[Path]) -> list[Recorded]:
    """Read runs and name each by as much of the end of its path as tells it from the others.

    Raises:
        ReportError: a run is missing, damaged, or given twice.
    """
    parts = [path.resolve().parts for path in paths]
    for place, own in enumerate(parts):
        if own in parts[:place]:
            raise ReportError(f"{paths[place]} is given twice; give each run once")
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    named = []
    for path, own in zip(paths, parts, strict=True):
        recorded = load(path)
        name = "/".join(own[-depth:]).lstrip("/")
        named.append(replace(recorded, run=replace(recorded.run, name=name)))
    return named


def load(path: Path) -> Recorded:
    """Read one run: a report directory, with events of TensorBoard or without, or Megatron's log.

    Raises:
        ReportError: nothing of the kind is there, or it is damaged.
    """
    if path.is_file():
        return _load_log(path)
    traffic, metrics = path / TRAFFIC_FILE, path / METRICS_FILE
    lines = metrics_lines(metrics) if metrics.exists() else []
    losses = _losses(metrics, lines)
    try:
        report = json.loads(traffic.read_bytes()) if traffic.exists() else None
        counted = {} if report is None else _counted(report)
        most = None if report is None else float(report["seconds"]["communication"]["max"])
    except _DAMAGED as error:
        raise ReportError(
            f"{traffic} is no run report ({error!r}); delete it to compare without traffic, or "
            "train on: a run with --mapl-rank writes it anew when it saves or ends"
        ) from None
    training, validation = event_losses(path)
    if report is None and not lines and not training:
        raise ReportError(
            f"{traffic} does not exist, nor events of TensorBoard beside it; it is written when a "
            "run with --mapl-rank saves or ends. Of a run without, give Megatron's log or its "
            "--tensorboard-dir"
        )
    run = Run(path.name or str(path), losses or training, validation, **counted)
    measured = any("geometry" in line for line in lines)
    return Recorded(run, report["boundaries"] if report else [], most, read_series(lines), measured)


def _losses(path: Path, lines: Sequence[Any]) -> Curve:
    """The training losses of a mapl_metrics.jsonl, of which each line is looked at by itself.

    Raises:
        ReportError: a line is not what a run writes.
    """
    losses = []
    for number, line in enumerate(lines, start=1):
        try:
            if line["loss"] is not None:
                losses.append((int(line["iteration"]), float(line["loss"])))
            read_series([line, line])  # two, for what lies between lines
        except _DAMAGED as error:
            raise damaged_line(path, number, error) from None
    return losses


def load_counted(directory: Path) -> Run:
    """As `load`, of a run whose traffic must be known.

    Raises:
        ReportError: it is not.
    """
    run = load(directory).run
    if run.traffic is None:
        raise ReportError(
            f"{directory / TRAFFIC_FILE} does not exist; it is written when a run with --mapl-rank "
            "saves or ends"
        )
    return run


def _load_log(path: Path) -> Recorded:
    with path.open(errors="replace") as file:
        log = TrainingLog.of(file)
    if not log.losses:
        raise ReportError(
            f"{path} has no line of Megatron's log with a loss; give such a log, or the directory "
            f"of {METRICS_FILE}"
        )
    return Recorded(Run(path.name, log.losses, log.validations, seconds=log.seconds), [], None, {})


def _counted(report: dict[str, Any]) -> dict[str, Any]:
    traffic, uncompressed = _traffic(report["boundaries"])
    return {
        "traffic": traffic,
        "uncompressed": uncompressed,
        "seconds": float(report["seconds"]["after_first_step"]),
        "communicating": float(report["seconds"]["communication"]["mean"]),
    }


def sent(boundary: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Direction → kind → bytes, of an entry of mapl_traffic.json's boundaries.

    Whole codebooks, sent now and then, are part of what their direction costs.
    """
    return {
        direction: {
            kind: sum(
                boundary.get(name, {}).get(kind, 0) for name in (direction, f"{direction}_codebook")
            )
            for kind in KINDS
        }
        for direction in ("forward", "backward", "projector")
    }


def _traffic(boundaries: list[dict[str, Any]]) -> tuple[Traffic, Traffic]:
    """What crossed all boundaries, and what plain Megatron would have sent over them."""
    total = dict.fromkeys(("forward", "backward", "projector"), 0)
    plain = {"forward": 0, "backward": 0}
    for boundary in boundaries:
        for direction, kinds in sent(boundary).items():
            total[direction] += sum(kinds.values())
        # The report has one figure for both directions. Payloads of activations and of gradients
        # stand for tensors of one size, so it divides as their numbers do.
        payloads = {d: boundary.get(d, {}).get("payloads", 0) for d in plain}
        share = payloads["forward"] / max(1, sum(payloads.values()))
        forward = round(boundary["uncompressed"] * share)
        plain["forward"] += forward
        plain["backward"] += boundary["uncompressed"] - forward
    if not sum(total.values()):
        raise ValueError("no byte crossed a boundary")
    return Traffic(**total), Traffic(**plain)


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
        sizes = (t.forward, t.backward, t.projector, t.total) if t else ()
        rows.append(
            [
                run.name,
                f"{run.losses[0][1]:.3f} → {losses[-1]:.3f}" if losses else "–",
                f"{run.validation[-1][1]:.4f}" if run.validation else "–",
                *([f"{n / 1e6:,.1f}" for n in sizes] or ["–"] * 4),
                f"{run.ratio:.2f}×" if t else "–",
                "–" if run.seconds is None else f"{run.seconds:.0f}",
                "–" if run.communicating is None else f"{run.communicating:.0f}",
            ]
        )
    return columns(names, rows, markdown=markdown)


def smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """The mean of each value and the up to `window` − 1 before it."""
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[s:e]) / (e - s) for e, s in enumerate(starts, start=1)]
