# SPDX-License-Identifier: Apache-2.0
"""The run report: mapl_traffic.json and mapl_metrics.jsonl; the latter goes to trackers too."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, print_rank_last

from mapl import traffic
from mapl.files import METRICS_FILE, TRAFFIC_FILE, write_atomically
from megatron.mapl import geometry, metrics_line, trackers
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
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, metrics_line.counted(runtime))
    if dist.get_rank() != 0:
        return
    report = {
        **traffic.report(own["sent"] for own in everyone),
        "steps": runtime.steps,
        "tokens": runtime.tokens,
        "seconds": metrics_line.seconds(everyone),
    }
    path = report_dir(runtime) / TRAFFIC_FILE
    write_atomically(path, json.dumps(report, indent=2) + "\n")


class _Recorder:
    """Averages the loss over a log interval and writes one line of metrics at its end."""

    def __init__(self, runtime: MaplRuntime) -> None:
        self._runtime = runtime
        self._losses: list[torch.Tensor] = []
        self._file_begun = False
        self._first_iteration = 0
        self._skipped: dict[int, int] = {}
        # Steps after the first that are in the last line, and their seconds in communication.
        self._timed: tuple[int, float] = (0, 0.0)

    def step(self, loss_dict: dict[str, torch.Tensor], iteration: int) -> None:
        """Called on every process after each step."""
        runtime, args = self._runtime, get_args()
        now = time.perf_counter()
        runtime.steps += 1
        runtime.tokens += get_current_global_batch_size() * args.seq_length
        if runtime.steps == 1:  # the first step has the start-up in it
            runtime.first_step_ended, runtime.communication_seconds = now, 0.0
            self._first_iteration = iteration
        if "lm loss" in loss_dict:
            self._losses.append(loss_dict["lm loss"].detach().float().mean())
        interval = runtime.config.log_interval or args.log_interval
        if iteration % interval == 0:
            self._write(iteration)
        for stage in runtime.stages:
            stage.measure_energy = (iteration + 1) % interval == 0

    def _write(self, iteration: int) -> None:
        runtime = self._runtime
        own = {
            "loss": float(torch.stack(self._losses).mean()) if self._losses else None,
            "stages": [metrics_line.describe(stage) for stage in runtime.stages],
            **metrics_line.counted(runtime),
        }
        self._losses.clear()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        tokens = get_args().consumed_train_samples * get_args().seq_length
        line = metrics_line.combine(iteration, tokens, everyone)
        geometry_interval = runtime.config.geometry_interval
        if geometry_interval is not None and iteration % geometry_interval == 0:
            line["geometry"] = geometry.collect(runtime, iteration)
        trackers.write(line)
        print_rank_last(trackers.log_line(line, self._communication_ms(line)))
        self._warn_of_skipped_steps(line)
        if dist.get_rank() == 0:
            self._append(line)

    def _communication_ms(self, line: dict[str, Any]) -> float | None:
        """An iteration, mean over processes and over what was timed since the last line.

        What evaluations since then have spent in communication is part of it.
        """
        before, self._timed = (
            self._timed,
            (self._runtime.steps - 1, line["seconds"]["communication"]["mean"]),
        )
        steps, seconds = (now - then for now, then in zip(self._timed, before, strict=True))
        return 1000 * seconds / steps if steps else None

    def _warn_of_skipped_steps(self, line: dict[str, Any]) -> None:
        for entry in line["boundaries"]:
            new = entry["skipped_steps"] - self._skipped.get(entry["boundary"], 0)
            self._skipped[entry["boundary"]] = entry["skipped_steps"]
            if new:
                print_rank_last(
                    f"WARNING: boundary {entry['boundary']}: the projector's gradient was not "
                    f"finite in {new} step(s) up to iteration {line['iteration']}; the projector "
                    "was left as it was"
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
