# SPDX-License-Identifier: Apache-2.0
"""A batch job that is stopped, queued again and goes on comes to the same as one that was not."""

import json
import signal
from pathlib import Path

from cluster import Cluster
from llama_example import SHRUNKEN, SHRUNKEN_MAPL, SlurmJob, wait_until
from test_llama_recipes import command

# Among those who get the signals are workers that load data, and the process behind the writers of
# the checkpoint before.
JOB = [*SHRUNKEN, *SHRUNKEN_MAPL, *"--train-iters 60 --save-interval 5 --num-workers 2".split()]


def metrics(folder: Path) -> list[tuple[int, int, float, float]]:
    """Its steps, tokens, losses and the projector's gradient norms, at full precision."""
    lines = map(json.loads, (folder / "mapl_metrics.jsonl").read_text().splitlines())
    return [
        (line["iteration"], line["tokens"], line["loss"], line["boundaries"][0]["gradient_norm"])
        for line in lines
    ]


def saved(folder: Path) -> int:
    latest = folder / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def test_a_stopped_job_comes_to_the_same(cluster: Cluster, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    cluster.run(2, command(straight, "150m", *JOB[len(SHRUNKEN) :]), tamper="whole_mock_data")

    variables = {"SAVE": str(stopped), "OMP_NUM_THREADS": "1", "NETWORK_INTERFACE": "lo"}
    job = SlurmJob(tmp_path, "bare-metal.sbatch", ["150m", *JOB], variables)
    running = job.start()
    wait_until(lambda: saved(stopped) > 0, running)
    job.time_is_nearly_up()
    job.signal_step(signal.SIGTERM)  # somebody wants its nodes as well
    assert running.wait(timeout=100) == 0, job.log.read_text()[-6000:]
    assert job.requeued == 1 and 5 < saved(stopped) < 60
    assert "exiting program after receiving SIGTERM" in job.log.read_text()
    assert job.run() == 0, job.log.read_text()[-6000:]
    assert job.requeued == 1 and saved(stopped) == 60
    assert {path.name for path in stopped.glob("iter_*")} == {"iter_0000050", "iter_0000060"}
    assert [step[0] for step in metrics(stopped)] == list(range(1, 61))
    assert metrics(stopped) == metrics(straight / "saved")
