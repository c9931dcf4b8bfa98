# SPDX-License-Identifier: Apache-2.0
"""examples/llama/train.sh: how it passes signals on to the processes that train."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from llama_example import wait_until
from test_llama_launcher import dataset, ends, train


@pytest.mark.parametrize("does", ["until-told", "starts"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_its_processes_get_sigterm_and_save(tmp_path: Path, does: str, how: signal.Signals) -> None:
    process = train(tmp_path, "tiny", "--mock-data", job=does)
    ready = "starting" if does == "starts" else "*.ready"
    wait_until(lambda: bool([*tmp_path.glob(ready)]), process)
    process.send_signal(how)
    process.send_signal(how)  # an impatient one
    ends(process, 0)
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "7"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_processes(tmp_path: Path, how: signal.Signals) -> None:
    """To all that there is of the job, as SLURM sends it."""
    process = train(tmp_path, "150m", job="slow-data", DATA=dataset(tmp_path))
    wait_until(lambda: (tmp_path / "preparing").exists(), process)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(how)
    ends(process, 0)
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "7"


def test_a_kernel_without_lists_of_children(tmp_path: Path) -> None:
    """Its files are not there, so `cat` fails; `ps` knows them too."""
    cat = tmp_path / "cat"
    cat.write_text("#!/bin/sh\nexit 1\n")
    cat.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = train(tmp_path, "tiny", "--mock-data", job="until-told", PATH=path)
    wait_until(lambda: bool([*tmp_path.glob("*.ready")]), process)
    process.terminate()
    ends(process, 0)


def test_interrupts_reach_torchrun(tmp_path: Path) -> None:
    process = train(tmp_path, "tiny", "--mock-data", job="until-told")
    wait_until(lambda: bool([*tmp_path.glob("*.ready")]), process)
    [worker] = [int(path.read_text()) for path in tmp_path.glob("*.ready")]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 128 + signal.SIGINT
    os.kill(worker, signal.SIGKILL)  # which the real torchrun would have ended
