# SPDX-License-Identifier: Apache-2.0
"""The run report: mapl_traffic.json and mapl_metrics.jsonl, and the same to TensorBoard, W&B."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from mapl import traffic
from mapl.boundary import principal_angles
from mapl.codecs import ResidualVQCodec
from mapl.files import METRICS_FILE, TRAFFIC_FILE, write_atomically
from mapl.stiefel import orthonormality_error
from megatron.mapl import geometry
from megatron.mapl.runtime import MaplRuntime


def recording(log: Callable[..., Any], runtime: MaplRuntime) -> Callable[..., Any]:
    """Megatron's `training_log`, after which the metrics of the step are noted."""
    recorder = _Recorder(runtime)

    def log_and_record(
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: Any,
        learning_rate: float | None,
        iteration: int,
        *more: Any,
        **kwargs: Any,
    ) -> Any:
        result = log(loss_dict, total_loss_dict, learning_rate, iteration, *more, **kwargs)
        recorder.step(loss_dict, iteration)
        return result

    return log_and_record


def report_dir(runtime: MaplRuntime) -> Path:
    """`--mapl-report-dir`, else `--save`, else ./mapl-report."""
    return Path(runtime.config.report_dir or get_args().save or "mapl-report")


def write_traffic(runtime: MaplRuntime) -> None:
    """Adds up the ledgers of all processes; rank 0 writes the file, whole or not at all.

    Raises:
        PayloadError: a payload since the last step, of an evaluation, was not what was due.
    """
    runtime.guard.raise_if_faulty()
    ledgers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        ledgers,
        (runtime.ledger.sent, runtime.communication_seconds, runtime.training_seconds),
    )
    if dist.get_rank() != 0:
        return
    entries, communication, training = zip(*ledgers, strict=True)
    report = {
        **traffic.report(entries),
        "steps": runtime.steps,
        "tokens": runtime.tokens,
        "seconds": {
            "after_first_step": max(training),
            "communication": {"mean": sum(communication) / len(ledgers), "max": max(communication)},
        },
    }
    path = report_dir(runtime) / TRAFFIC_FILE
    write_atomically(path, json.dumps(report, indent=2) + "\n")


class _Recorder:
    """Averages the loss over a log interval and writes one line of metrics at its end."""

    def __init__(self, runtime: MaplRuntime) -> None:
        self._runtime = runtime
        self._losses: list[torch.Tensor] = []
        self._file_begun = False
        self._start = time.perf_counter()
        self._first_iteration = 0
        self._skipped: dict[int, int] = {}

    def step(self, loss_dict: dict[str, torch.Tensor], iteration: int) -> None:
        """Called on every process after each step."""
        runtime, args = self._runtime, get_args()
        now = time.perf_counter()
        runtime.steps += 1
        runtime.tokens += get_current_global_batch_size() * args.seq_length
        if runtime.steps == 1:  # the first step has the start-up in it
            self._start, runtime.communication_seconds = now, 0.0
            self._first_iteration = iteration
        runtime.training_seconds = now - self._start
        if "lm loss" in loss_dict:
            self._losses.append(loss_dict["lm loss"].detach().float().mean())
        interval = runtime.config.log_interval or args.log_interval
        if iteration % interval == 0:
            self._write(iteration)
        for stage in runtime.stages:
            stage.measure_energy = (iteration + 1) % interval == 0

    def _write(self, iteration: int) -> None:
        own = {
            "loss": float(torch.stack(self._losses).mean()) if self._losses else None,
            "stages": [_describe(stage) for stage in self._runtime.stages],
            "sent": traffic.report([self._runtime.ledger.sent])["total"],
        }
        self._losses.clear()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        tokens = get_args().consumed_train_samples * get_args().seq_length
        line = _combine(iteration, tokens, everyone)
        geometry_interval = self._runtime.config.geometry_interval
        if geometry_interval is not None and iteration % geometry_interval == 0:
            line["geometry"] = geometry.collect(self._runtime, iteration)
        _write_to_trackers(line)
        if dist.get_rank() == 0:
            self._warn_of_skipped_steps(line)
            self._append(line)

    def _warn_of_skipped_steps(self, line: dict[str, Any]) -> None:
        for entry in line["boundaries"]:
            new = entry["skipped_steps"] - self._skipped.get(entry["boundary"], 0)
            self._skipped[entry["boundary"]] = entry["skipped_steps"]
            if new:
                print(
                    f"WARNING: boundary {entry['boundary']}: the projector's gradient was not "
                    f"finite in {new} step(s) up to iteration {line['iteration']}; the projector "
                    "was left as it was",
                    flush=True,
                )

    def _append(self, line: dict[str, Any]) -> None:
        path = report_dir(self._runtime) / METRICS_FILE
        if not self._file_begun:
            # A resumed run repeats the steps after its checkpoint: its lines replace the old ones.
            kept = _lines_before(path, self._first_iteration)
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))
            self._file_begun = True
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _describe(stage: Any) -> dict[str, Any]:
    """What one chunk knows: its outlet's boundary, and the angle between its two projectors."""
    outlet, inlet = stage.outlet, stage.inlet
    description: dict[str, Any] = {"boundary": None, "angle": None, "codebooks": _codebooks(stage)}
    if outlet is None or outlet.projector is None:
        return description
    projector = outlet.projector
    description["boundary"] = {
        "boundary": outlet.boundary,
        "energy_kept": None if stage.energy is None else float(stage.energy),
        "orthonormality_error": float(orthonormality_error(projector.A)),
        "gradient_norm": _finite(projector.grad.norm()) if projector.learns else None,
        "skipped_steps": int(projector.skipped_steps) if projector.learns else 0,
    }
    if inlet is not None and inlet.projector is not None:
        angles = principal_angles(inlet.projector.A, projector.A)
        description["angle"] = {
            "boundaries": [inlet.boundary, outlet.boundary],
            "mean_degrees": float(angles.mean()),
            "smallest_degrees": float(angles.min()),
        }
    return description


def _codebooks(stage: Any) -> list[dict[str, Any]]:
    """How the codebooks that this chunk encodes with are used."""
    return [
        {"boundary": port.boundary, "direction": direction, **codec.usage()}
        for port in (stage.inlet, stage.outlet)
        if port is not None
        for direction, codec in (("forward", port.forward_codec), ("backward", port.backward_codec))
        if isinstance(codec, ResidualVQCodec) and codec.sends
    ]


def _finite(value: torch.Tensor) -> float | None:
    """None for what JSON has no number for: the gradient of a step that was skipped."""
    number = float(value)
    return number if math.isfinite(number) else None


def _combine(iteration: int, tokens: int, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of metrics from what all processes know.

    Replicas of a boundary agree but for the energy, which is a mean over their micro-batches.
    `tokens` count from the start of training, bytes from the start of this run.
    """
    losses = [own["loss"] for own in everyone if own["loss"] is not None]
    stages = [stage for own in everyone for stage in own["stages"]]
    boundaries = {s["boundary"]["boundary"]: s["boundary"] for s in stages if s["boundary"]}
    for number, entry in boundaries.items():
        energies = [
            s["boundary"]["energy_kept"]
            for s in stages
            if s["boundary"] and s["boundary"]["boundary"] == number
        ]
        if None not in energies:
            entry["energy_kept"] = sum(energies) / len(energies)
    angles = {tuple(s["angle"]["boundaries"]): s["angle"] for s in stages if s["angle"]}
    codebooks = {
        (entry["boundary"], entry["direction"]): entry for s in stages for entry in s["codebooks"]
    }
    sent = sum(own["sent"]["sent"] for own in everyone)
    uncompressed = sum(own["sent"]["uncompressed"] for own in everyone)
    return {
        "iteration": iteration,
        "tokens": tokens,
        "loss": sum(losses) / len(losses) if losses else None,
        "sent_bytes": sent,
        "uncompressed_bytes": uncompressed,
        "ratio": uncompressed / sent if sent else None,
        "sent_by_kind": {k: sum(own["sent"][k] for own in everyone) for k in traffic.KINDS},
        "boundaries": [boundaries[b] for b in sorted(boundaries)],
        "angles": [angles[b] for b in sorted(angles)],
        "codebooks": [codebooks[place] for place in sorted(codebooks)],
    }


def _write_to_trackers(line: dict[str, Any]) -> None:
    """TensorBoard and W&B, on the rank where Megatron keeps its writers."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    scalars = {
        f"mapl/{name.replace('_', '-')}": line[name]
        for name in ("ratio", "sent_bytes", "uncompressed_bytes", "tokens")
    }
    scalars |= {f"mapl/sent/{kind}": value for kind, value in line["sent_by_kind"].items()}
    for entry in line["codebooks"]:
        place = f"mapl/boundary-{entry['boundary']}/{entry['direction']}"
        scalars |= {f"{place}-perplexity": entry["perplexity"], f"{place}-dead": entry["dead"]}
    for entry in line["boundaries"]:
        for name, value in entry.items():
            if name != "boundary":
                scalars[f"mapl/boundary-{entry['boundary']}/{name.replace('_', '-')}"] = value
    for entry in line["angles"]:
        between = "-".join(map(str, entry["boundaries"]))
        for name in ("mean_degrees", "smallest_degrees"):
            scalars[f"mapl/angle-{between}/{name.replace('_', '-')}"] = entry[name]
    scalars |= geometry.scalars(line["geometry"]) if "geometry" in line else {}
    scalars = {name: value for name, value in scalars.items() if value is not None}
    if tensorboard:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, line["iteration"])
    if wandb:
        wandb.log(scalars, line["iteration"])


def _lines_before(path: Path, iteration: int) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return []
    kept = []
    for text in path.read_text().splitlines():
        try:
            entry = json.loads(text)
        except json.JSONDecodeError:
            break  # the line that a killed run was writing
        if entry["iteration"] < iteration:
            kept.append(entry)
    return kept
