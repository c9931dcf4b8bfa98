# SPDX-License-Identifier: Apache-2.0
"""The test's side of launcher.py: start it once, hand it jobs, read what they noted."""

import contextlib
import fcntl
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _other_paths() -> list[str]:
    """Where else this process was told to look for modules: for another Megatron."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@dataclass
class Result:
    """What a job left behind."""

    folder: Path
    codes: list[int]
    records: list[dict[str, Any]] = field(default_factory=list)

    def read_records(self) -> None:
        """Reads what each process noted."""
        self.records = [
            torch.load(self.folder / f"record.{rank}", weights_only=False)
            for rank in range(len(self.codes))
        ]

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
    """A launcher that runs jobs of one to four processes.

    Several may run at once, one for each process of pytest.

    Args:
        directory: for the jobs of this cluster.
        shared: for what `run_once` knows, the same for all clusters of a session.
    """

    def __init__(self, directory: Path, shared: Path) -> None:
        self._directory = directory
        self._shared = shared
        self._jobs = 0
        # Below the ports that a kernel hands out, so that nobody is given the next one.
        # Each process of pytest has a range of its own.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
        self._ports = itertools.count(10_000 + 5_000 * worker + random.randrange(4_000))
        self._known: dict[str, Result] = {}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), *_other_paths()]),
            "PYTHONUNBUFFERED": "1",
        }
        self._output = (directory / "launcher.log").open("w")
        self._launcher = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py"), str(directory)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            bufsize=1,
        )

    def run(
        self,
        world_size: int,
        arguments: list[str],
        *,
        plain: bool = False,
        script: Path | None = None,
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
            script: run this one in its place, as `python -m megatron.mapl` does.
            rank_arguments: more arguments for single ranks.
            environment: more variables.
            tamper: a function of tampering.py, called in each process before the job.
            fails: whether the job is to fail; otherwise a failure fails the test.
            timeout: seconds.
        """
        folder = self._directory / f"job-{self._jobs}"
        self._jobs += 1
        job = {
            "folder": folder.name,
            "world_size": world_size,
            "arguments": arguments,
            "plain": plain,
            "script": str(script) if script else "",
            "rank_arguments": rank_arguments or {},
            "environment": environment or {},
            "tamper": tamper,
            "port": self._free_port(),
            "timeout": timeout,
        }
        assert self._launcher.stdin and self._launcher.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self._launcher.stdin)
        answer = self._launcher.stdout.readline()
        if not answer:
            log = (self._directory / "launcher.log").read_text()
            raise RuntimeError(f"the launcher does not answer:\n{log[-4000:]}")
        result = Result(folder, json.loads(answer))
        if not fails:
            assert not any(result.codes), f"{result.codes}\n{result.log[-6000:]}"
            result.read_records()
        return result

    def run_once(self, world_size: int, arguments: list[str], *, plain: bool = False) -> Result:
        """As `run`, but a job that was run by this method before is not run again.

        For jobs that others are compared with; whoever changes a result spoils it for all.
        """
        job = json.dumps([world_size, arguments, plain])
        if job not in self._known:
            known = self._shared / sha256(job.encode()).hexdigest()
            with known.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another cluster may be running it
                file.seek(0)
                folder = file.read()
                if folder:
                    result = Result(Path(folder), [0] * world_size)
                    result.read_records()
                else:
                    result = self.run(world_size, arguments, plain=plain)
                    file.write(str(result.folder))
            self._known[job] = result
        return self._known[job]

    def stop(self) -> None:
        """Ends the launcher."""
        assert self._launcher.stdin
        self._launcher.stdin.close()
        try:
            self._launcher.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._launcher.terminate()
            self._launcher.wait(timeout=30)
        self._output.close()

    def _free_port(self) -> int:
        for port in self._ports:
            with socket.socket() as listener, contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return port
        raise AssertionError
