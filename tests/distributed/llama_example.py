# SPDX-License-Identifier: Apache-2.0
"""examples/llama under test: a stand-in for its Python, and a SLURM that is this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LLAMA = ROOT / "examples" / "llama"
RECIPES = sorted(path.stem for path in (LLAMA / "recipes").glob("*.flags") if path.stem != "common")

#: Flags that make any recipe so small that it trains in a second; they come after its own. More
#: heads than the groups of a recipe's queries, and what tensor parallelism it has by `SPLIT`.
SHRUNKEN = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 16 "
    "--seq-length 32 --max-position-embeddings 32 --global-batch-size 4 --micro-batch-size 2 "
    "--vocab-size 300 --train-iters 4 --eval-iters 1 --log-interval 1 --mock-data "
    "--pipeline-model-parallel-size 2"
).split()
#: More of them for recipes whose stages are split: 8 ways by themselves.
SPLIT = {recipe: "--tensor-model-parallel-size 2".split() for recipe in ("7b", "8b")}
SHRUNKEN_MAPL = "--mapl-rank 16 --mapl-anchor-buckets 512".split()

# Of whoever runs the tests, who may do so in a job of a real SLURM.
_FOREIGN = re.compile(
    r"SLURM_|CUDA_|NCCL_|GLOO_|MASTER_|CONTAINER_|"
    r"(NNODES|NODE_RANK|NPROC_PER_NODE|NETWORK_INTERFACE|DATA|SAVE|PLAIN)$"
)


def environment(**more: str) -> dict[str, str]:
    """Variables for the scripts, with this checkout's code."""
    own = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    return {
        **own,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def stand_in(folder: Path, job: str = "finish") -> dict[str, str]:
    """Variables with which stand_in_trainer.py is the scripts' Python."""
    python = folder / "stand-in-python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE}/stand_in_trainer.py" "$@"\n')
    python.chmod(0o755)
    return {"PYTHON": str(python), "STAND_IN": str(folder), "STAND_IN_JOB": job}


def noted(folder: Path, node: int = 0) -> dict[str, Any]:
    """What the stand-in was called with on a node."""
    note: dict[str, Any] = json.loads((folder / f"node-{node}.json").read_text())
    return note


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Waits for something that a running process is to do."""
    end = time.monotonic() + 150
    while not happened():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


class SlurmJob:
    """A batch script as SLURM would run it, on `nodes` that all are this machine.

    Args:
        folder: for what the stand-ins of SLURM note.
        script: a file of examples/llama/slurm.
        arguments: of the script.
        variables: that sbatch was called with.
        nodes: how many.
    """

    def __init__(
        self,
        folder: Path,
        script: str,
        arguments: list[str],
        variables: dict[str, str],
        nodes: int = 2,
    ) -> None:
        self.folder = folder
        self.log = folder / "job.log"
        self._script = LLAMA / "slurm" / script
        self._arguments = arguments
        self._restarts = 0
        hosts = ",".join(["localhost", *(f"host-{n}" for n in range(1, nodes))])
        #: Of the script, in its environment.
        self.variables = environment(
            FAKE_SLURM=str(folder),
            SLURM_JOB_ID="4711",
            SLURM_JOB_NODELIST=hosts,
            SLURM_NNODES=str(nodes),
            SLURM_SUBMIT_DIR=str(ROOT),
            **variables,
        )
        self.variables["PATH"] = f"{HERE / 'fake_slurm'}:{os.environ['PATH']}"

    def start(self) -> subprocess.Popen[Any]:
        """Starts the script, which SLURM has copied to a place of its own."""
        spooled = self.folder / "slurm_script"
        shutil.copy(self._script, spooled)
        variables = {**self.variables, "SLURM_RESTART_COUNT": str(self._restarts)}
        with self.log.open("a") as log:
            process = subprocess.Popen(
                ["bash", str(spooled), *self._arguments],
                env=variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._restarts += 1
        return process

    def run(self) -> int:
        """Runs it to its end; its exit code."""
        return self.start().wait(timeout=200)

    def time_is_nearly_up(self) -> None:
        """Sends what the script has asked for to whom it has asked."""
        asked = re.search(r"^#SBATCH --signal=([A-Z0-9]+)@\d+$", self._script.read_text(), re.M)
        assert asked, "the script asks for no signal to its steps"
        self.signal_step(signal.Signals[f"SIG{asked[1]}"])

    def signal_step(self, number: signal.Signals) -> None:
        """A signal to all processes of the step, in whatever session, as SLURM sends it."""
        step = psutil.Process(int((self.folder / "step").read_text()))
        for process in step.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @property
    def requeued(self) -> int:
        """How often the script has asked SLURM to queue it again."""
        note = self.folder / "requeued"
        ids = note.read_text().split() if note.exists() else []
        assert {*ids} <= {"4711"}
        return len(ids)

    @property
    def srun(self) -> list[list[str]]:
        """The words of each call of srun."""
        return [json.loads(line) for line in (self.folder / "srun.jsonl").read_text().splitlines()]
