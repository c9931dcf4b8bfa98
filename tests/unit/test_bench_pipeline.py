# SPDX-License-Identifier: Apache-2.0
"""The pipeline bench: its arithmetic, its tables, and one run of it in CPU mode."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import bench_pipeline_plan as plan
from bench_pipeline_profile import summarise
from bench_pipeline_tables import page, steps_of

ROOT = Path(__file__).parent.parent.parent


def test_the_model_has_about_a_billion_parameters() -> None:
    model = plan.Model()
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5504 + 2 * 2048
    assert model.parameters == 20 * layer + 2 * 32000 * 2048 + 2048
    assert 1.0e9 < model.parameters < 1.2e9
    multiplied = 20 * layer + 32000 * 2048 + 2048
    assert model.flops_a_token == 6 * multiplied + 12 * 20 * 2048 * 2048
    assert model.layers % 4 == 0  # four stages, real or virtual


def report(**more: Any) -> dict[str, Any]:
    def training(setting: str, seconds: float, number: int) -> dict[str, Any]:
        rank = {
            "times": [seconds * step + (100 if step else 0) for step in range(5)],
            "losses": [2.0, 1.0],
            "max_memory": 2**30 if setting == "plain" else 2**30 + 2**21,
            "device": "GPU",
            **more,
        }
        return {"setting": setting, "round": number, "seconds": 9.0, "ranks": [rank, rank]}

    return {
        "layout": "gloo-pp2",
        "gpus": 1,
        "model": asdict(plan.TINY),
        "parameters": 7e9,
        "flops_a_token": 1e9,
        "tokens": 1000,
        "torch": "2",
        "peak": 1e13,
        "datasheet": 2e13,
        "warm_up": 1,
        "trainings": [
            training("plain", 0.5, 0),
            training("mapl", 0.625, 0),
            {"setting": "rvq", "round": 0, "error": "exit code 1", "log": ""},
            training("plain", 0.5, 1),
        ],
    }


def test_tables() -> None:
    text = page(report())
    assert steps_of(report(), "plain") == [0.5] * 6  # the step before them was the warm-up
    assert "| plain | 500.0 | 2,000 | 20.0% | 10.0% | 1.0000 | – |" in text
    assert "| mapl | 625.0 | 1,600 | 16.0% | 8.0% | 0.8000 | – |" in text
    assert "| mapl | 1.00, 1.00 | +2, +2 | 0, 0 |" in text
    assert "rvq" not in text


def test_a_profile_counts_the_waits_of_one_thread() -> None:
    def event(name: str, thread: int, ts: float, dur: float, cat: str = "cuda_runtime") -> Any:
        return {"ph": "X", "name": name, "tid": thread, "ts": ts, "dur": dur, "cat": cat}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cudaStreamSynchronize", 1, 0, 1000),
        event("cudaEventSynchronize", 2, 0, 9000),
        event("cudaLaunchKernel", 1, 5000, 1000),
        event("gemm", 7, 0, 2000, "kernel"),
        event("copy", 8, 1000, 2000, "gpu_memcpy"),
        event("gemm", 7, 4000, 1000, "kernel"),
    ]
    summary = summarise({"traceEvents": events}, 1)
    assert summary["waits"] == {"cudaStreamSynchronize": 1}
    assert summary["waited_ms"] == 1 and summary["step_ms"] == 6 and summary["busy_ms"] == 4
    assert summary["kernels"] == {"gemm": 3, "copy": 2}
    table = page(report(profile=summary))
    assert "| plain | 1 cudaStreamSynchronize | 0.2 | 1.0 | 6.0 | 4.0 |" in table


@pytest.mark.parametrize("setting", ["mapl"])
def test_a_run(tmp_path: Path, setting: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench_pipeline.py"), "--tiny", "--layout"]
    command += ["gloo-pp2", "--settings", setting, "--rounds", "1", "--steps", "4", "--warm-up"]
    command += ["1", "--profile", "profiles"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "bench_pipeline.json").read_text())
    (training,) = found["trainings"]
    assert len(steps_of(found, setting)) == 2
    assert training["ratio"] > 2
    assert [len(rank["times"]) for rank in training["ranks"]] == [4, 4]
    assert training["ranks"][1]["profile"]["step_ms"] > 0
    assert (tmp_path / "profiles" / "gloo-pp2-mapl.json.gz").exists()
    assert f"| {setting} |" in run.stdout
