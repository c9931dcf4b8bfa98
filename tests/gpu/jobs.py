# SPDX-License-Identifier: Apache-2.0
"""Runs training jobs of several processes on this machine's GPUs."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DISTRIBUTED = ROOT / "tests" / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

from cluster import Result  # noqa: E402
from layouts import HIDDEN, MODEL, PP2, PP4, VPP, with_plain_boundaries  # noqa: E402

__all__ = ["HIDDEN", "PP2", "PP4", "VPP", "Result", "assert_sides_equal", "run"]

#: To look at these tests' logic where there is no GPU.
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"


@cache
def run(
    processes: int,
    arguments: str,
    *,
    deterministic: bool = False,
    around_payloads: str = "",
) -> Result:
    """Runs a job to its end; one that was run before is not run again.

    Args:
        arguments: beside those of the model (tests/distributed/layouts.py).
        deterministic: whether the same job must give the same bits.
        around_payloads: "spoil" freed memory, or "wait" for the stream, before and after each is
            packed and unpacked.
    """
    folder = Path(mkdtemp(prefix="mapl-job-"))
    job = {
        "arguments": with_plain_boundaries([*MODEL, *arguments.split()]),
        "deterministic": deterministic,
        "around_payloads": around_payloads,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), str(HERE / "job.py"), str(folder), json.dumps(job)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(DISTRIBUTED), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if "--tensor-model-parallel-size" in arguments:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it then
    with (folder / "log.0").open("w") as log:
        done = subprocess.run(
            command, cwd=folder, env=variables, stdout=log, stderr=log, timeout=300
        )
    result = Result(folder, [done.returncode])
    assert done.returncode == 0, result.log[-6000:]
    result.records = [
        torch.load(folder / f"record.{rank}", weights_only=False, map_location="cpu")
        for rank in range(processes)
    ]
    return result


def assert_sides_equal(result: Result, boundaries: int) -> None:
    """Both sides hold the same projectors and codebooks, bit for bit; the projectors moved."""
    for kind in ("projectors", "codebooks"):
        held: dict[int, list] = {}
        for record in result.records:
            for (boundary, _), state in record[kind].items():
                held.setdefault(boundary, []).append(state)
        assert sorted(held) == list(range(boundaries)), kind
        for boundary, (one, other) in held.items():
            if isinstance(one, dict):
                one, other = list(one.values()), list(other.values())
            for left, right in zip(one, other, strict=True):
                assert torch.equal(left, right), (kind, boundary)
    for record in result.records:
        for key, state in record["projectors"].items():
            a = state["A"]
            assert (a.T @ a - torch.eye(a.shape[1])).abs().max() < 1e-5
            assert (a - record["start"][key]["A"]).abs().max() > 1e-5, key
