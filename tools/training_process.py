# SPDX-License-Identifier: Apache-2.0
"""The processes of a training on this machine: started by torchrun, and left none of."""

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def environment(processes: int) -> dict[str, str]:
    """This process's environment, for a job among whose processes the cores are divided."""
    cores = len(os.sched_getaffinity(0))
    variables = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))}
    variables.pop("PYTHONUNBUFFERED", None)  # it would tear lines of several processes apart
    return variables


def alone(variables: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would add for a job of one process, on a port that the system picks."""
    return {
        **variables,
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def stop(process: subprocess.Popen[str], timeout: float = 15) -> None:
    """Ends a job with all its processes, by force after `timeout` seconds."""
    if process.poll() is not None:
        return
    family = []
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        family = [*leader.children(recursive=True), leader]
    try:
        process.terminate()  # torchrun ends its workers, each of which is in a session of its own
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=timeout)
    finally:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
