# SPDX-License-Identifier: Apache-2.0
"""The test's side of launcher.py: start it once, hand it jobs, read what they noted."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROCESSES = 4


@dataclass
class Result:
    """What a job left behind."""

    folder: Path
    codes: list[int]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What all processes printed."""
        return "\n".join(f.read_text() for f in sorted(self.folder.glob("log.*")))

    @property
    def losses(self) -> list[float]:
        """The loss of each step, as the process of the last stage saw it."""
        return next(record["loss"] for record in reversed(self.records) if record["loss"])

    @property
    def validation(self) -> list[float]:
        """The losses of evaluations."""
        return next(r["validation"] for r in reversed(self.records) if r["validation"])

    @property
    def traffic(self) -> dict[str, Any]:
        """mapl_traffic.json."""
        report: dict[str, Any] = json.loads(
            (self.folder / "mapl-report" / "mapl_traffic.json").read_text()
        )
        return report

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of mapl_metrics.jsonl."""
        text = (self.folder / "mapl-report" / "mapl_metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


class Cluster:
    """Four processes under one torchrun that run jobs of one to four processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._jobs = 0
        self._known: dict[tuple[Any, ...], Result] = {}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(PROCESSES), str(HERE / "launcher.py"), str(directory)]
        self._output = (directory / "torchrun.log").open("w")
        self._torchrun = subprocess.Popen(
            command, env=environment, stdout=self._output, stderr=subprocess.STDOUT
        )
        self._await(lambda: len(list(directory.glob("ready.*"))) == PROCESSES, 180)

    def run(
        self,
        world_size: int,
        arguments: list[str],
        *,
        plain: bool = False,
        rank_arguments: dict[int, list[str]] | None = None,
        environment: dict[str, str] | None = None,
        tamper: str = "",
        fails: bool = False,
        timeout: float = 150,
    ) -> Result:
        """Runs a job to its end.

        Args:
            world_size: processes.
            arguments: of pretrain_gpt.py.
            plain: run plain_megatron.py in its place.
            rank_arguments: more arguments for single ranks.
            environment: more variables.
            tamper: a function of tampering.py, called in each process before the job.
            fails: whether the job is to fail; otherwise a failure fails the test.
            timeout: seconds.
        """
        folder = self._directory / f"job-{self._jobs}"
        job = {
            "world_size": world_size,
            "arguments": arguments,
            "plain": plain,
            "rank_arguments": rank_arguments or {},
            "environment": environment or {},
            "tamper": tamper,
            "port": _free_port(),
            "timeout": timeout,
        }
        partial = self._directory / "next"
        partial.write_text(json.dumps(job))
        partial.rename(self._directory / f"job-{self._jobs}.json")
        self._jobs += 1
        statuses = [folder / f"status.{rank}" for rank in range(world_size)]
        self._await(lambda: all(s.exists() and s.read_text() for s in statuses), timeout + 60)
        result = Result(folder, [int(status.read_text()) for status in statuses])
        if not fails:
            assert not any(result.codes), f"{result.codes}\n{result.log[-6000:]}"
            result.records = [
                torch.load(folder / f"record.{rank}", weights_only=False)
                for rank in range(world_size)
            ]
        return result

    def run_once(self, world_size: int, arguments: list[str]) -> Result:
        """As `run`, but a job that was run by this method before is not run again.

        For jobs that others are compared with; whoever changes a result spoils it for all.
        """
        key = (world_size, *arguments)
        if key not in self._known:
            self._known[key] = self.run(world_size, arguments)
        return self._known[key]

    def stop(self) -> None:
        """Ends torchrun and its processes."""
        (self._directory / "stop").touch()
        try:
            self._torchrun.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._torchrun.terminate()
            self._torchrun.wait(timeout=30)
        self._output.close()

    def _await(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self._torchrun.poll() is not None or time.monotonic() > deadline:
                log = (self._directory / "torchrun.log").read_text()
                raise RuntimeError(f"the launcher does not answer:\n{log[-4000:]}")
            time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
