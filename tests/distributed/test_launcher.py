# SPDX-License-Identifier: Apache-2.0
"""The launcher of these tests leaves no process behind, and nobody waiting."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster import Cluster
from layouts import LAYOUTS


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_takes_its_jobs_along(tmp_path: Path, how: signal.Signals) -> None:
    for name in ("jobs", "shared"):
        (tmp_path / name).mkdir()
    cluster = Cluster(tmp_path / "jobs", tmp_path / "shared")
    launcher = cluster._launcher.pid
    errors: list[BaseException] = []

    def work() -> None:
        try:
            cluster.run(2, LAYOUTS["pp2"].command("--train-iters 100000"))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    log = tmp_path / "jobs" / "job-0" / "log.1"
    deadline = time.monotonic() + 120
    while not (log.exists() and "lm loss" in log.read_text()):
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.1)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    assert len(children) == 2
    os.kill(launcher, how)
    thread.join(60)
    assert not thread.is_alive() and "does not answer" in str(errors[0])
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process of the job is left"
        time.sleep(0.1)
    cluster.stop()
