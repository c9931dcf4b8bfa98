# SPDX-License-Identifier: Apache-2.0
"""The command line of the README: torchrun starts `pretrain_gpt.py`, and it is the same job."""

import os
import re
import subprocess
import sys
from pathlib import Path

from cluster import Cluster
from layouts import LAYOUTS

ROOT = Path(__file__).parent.parent.parent
LOSS = re.compile(r"lm loss(?: value)?: (\S+)")


def test_torchrun_starts_the_same_job(cluster: Cluster, tmp_path: Path) -> None:
    """Processes of their own, which share neither hash seeds nor memory with each other."""
    layout = LAYOUTS["tp2-pp2"]
    save = "--save-interval 2 --ckpt-format torch_dist --async-save"
    arguments = layout.command("--mapl-rank 16 --mapl-forward-codec int8", save, "--save saved")
    forked = cluster.run(layout.world_size, arguments, tamper="whole_mock_data")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(layout.world_size), str(ROOT / "pretrain_gpt.py"), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    variables["TMPDIR"] = str(tmp_path)  # torchrun leaves a folder of logs there
    started = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200
    )
    assert started.returncode == 0, started.stderr[-3000:]
    losses = LOSS.findall(started.stdout)
    assert len(losses) >= 4 + 2  # of the steps, of validation and of test
    assert losses == LOSS.findall(forked.log)
    assert (tmp_path / "saved" / "mapl_traffic.json").exists()
    assert (tmp_path / "saved" / "iter_0000004" / "metadata.json").exists()
