# SPDX-License-Identifier: Apache-2.0
"""sweep.py with Megatron: stopped and gone on with, runs come to the same as without a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from layouts import MODEL

ROOT = Path(__file__).parent.parent.parent

LIST = f"""
save_interval = 2
[model]
flags = "{" ".join(MODEL)}"
[training]
flags = "--train-iters 20 --global-batch-size 8 --split 90,10,0 --bf16 --eval-interval 3 \
--optimizer muon --muon-scale-mode shape_scaling --decoupled-lr 1e-3"
[data]
flags = ""
[[run]]
name = "uncompressed"
[[run]]
name = "int8"
flags = "--mapl-rank 16 --mapl-virtual-stages 4 --mapl-forward-codec int8"
"""


def start(folder: Path, output: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), "list.toml"]
    command += ["--output", output, *more]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int) -> None:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said


def stop_in(process: subprocess.Popen[str], log: Path) -> None:
    """Stops a sweep after the second step of a run."""
    end = time.monotonic() + 100
    while not (log.exists() and "iteration        2/" in log.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, 3)


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "result.json").read_text())
    return found


def test_a_stopped_sweep_comes_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text(LIST)
    finish(start(tmp_path, "straight", "--only", "int8"), 0)
    folder = tmp_path / "stopped" / "int8"
    stop_in(start(tmp_path, "stopped", "--workers", "2"), folder / "log.txt")
    log = (folder / "log.txt").read_text()
    assert "exiting program after receiving SIGTERM" in log
    assert "iteration       20/" not in log
    assert len(list((folder / "checkpoint").glob("iter_*"))) == 1
    finish(start(tmp_path, "stopped", "--workers", "2"), 0)
    straight, stopped = (result(tmp_path / way, "int8") for way in ("straight", "stopped"))
    for what in ("validation", "traffic"):
        assert stopped[what] == straight[what]
    losses = [[loss for _, loss in run["losses"]] for run in (straight, stopped)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)  # what is logged is rounded
    assert [step for step, _ in straight["losses"]] == list(range(1, 21))
    uncompressed = result(tmp_path / "stopped", "uncompressed")
    assert [step for step, _ in uncompressed["losses"]] == list(range(1, 21))
    traffic = straight["traffic"]
    assert (traffic["tokens"], traffic["uncompressed"]) == (20 * 8 * 32, 64 * 2)
    # 16 numbers of a byte and a scale of 2 bytes for each; an id of a byte, and headers
    assert 16 + 2 + 1 < traffic["forward"] < 16 + 2 + 2
    assert traffic["once_a_step"] >= 2 * 64 * 16 * 2 / (8 * 32)  # A's gradient, both ways, in bf16
