# SPDX-License-Identifier: Apache-2.0
"""One training of the slow-network bench: a process for each stage, driven by what it logs.

The bandwidth of the links changes while it runs, from one phase to the next.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from slow_network_plan import Phase
from training_log import Step, reason

ROOT = Path(__file__).resolve().parent.parent

# No step takes this long, nor does the start or the end.
_STALLED = 600.0


class JobError(RuntimeError):
    """A training failed; the message has what its log says."""

    @property
    def brief(self) -> str:
        """What failed, and the first error that the log names, in one line."""
        first, *log = str(self).splitlines()
        return " ".join([first, *[line.strip() for line in log if "rror: " in line][:1]])


@dataclass
class Course:
    """Where a job stands in its phases.

    Attributes:
        steps: the timed steps of each phase, in the order of the phases.
        all_steps: all of them.
    """

    phases: Sequence[Phase]
    steps: list[list[Step]] = field(default_factory=list)
    all_steps: list[Step] = field(default_factory=list)
    _in_phase: int = 0

    def __post_init__(self) -> None:
        self.steps.append([])

    @property
    def phase(self) -> Phase:
        return self.phases[len(self.steps) - 1]

    @property
    def about_to_time(self) -> bool:
        """Whether the next step is the first timed one of its phase."""
        return self._in_phase == self.phase.discard

    @property
    def phase_is_over(self) -> bool:
        """Whether it has all of its timed steps."""
        timed = self.steps[-1]
        enough = sum(step.seconds for step in timed) >= self.phase.seconds
        return len(timed) >= self.phase.steps and enough

    def take(self, step: Step) -> bool:
        """Books a step.

        Returns:
            Whether it was the last of its phase.
        """
        self.all_steps.append(step)
        self._in_phase += 1
        if self._in_phase <= self.phase.discard:
            return False
        self.steps[-1].append(step)
        return self.phase_is_over

    def next_phase(self) -> bool:
        """Goes on to the next phase; False if there is none."""
        if len(self.steps) == len(self.phases):
            return False
        self.steps.append([])
        self._in_phase = 0
        return True


@dataclass(frozen=True)
class Place:
    """Where the stages of a job run.

    Attributes:
        enter: stage and command → the command that runs it there.
        address: of the first stage.
        device: the interface that has a stage's address.
    """

    enter: Callable[[int, Sequence[str]], list[str]]
    address: str
    device: str


class Training:
    """The processes of one job; a context at whose end none is left."""

    def __init__(self, flags: Sequence[str], stages: int, place: Place, log: Path) -> None:
        """
        Args:
            flags: of pretrain_gpt.py.
            log: where the last stage's output goes; the others' beside it.
        """
        self._command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags]
        self._stages, self._place = stages, place
        self._logs = [log.with_name(f"{log.name}.stage{stage}") for stage in range(stages - 1)]
        self._logs.append(log)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Training":
        self._logs[-1].parent.mkdir(parents=True, exist_ok=True)
        try:
            for stage, log in enumerate(self._logs):
                with log.open("wb") as file:
                    self._processes.append(self._start(stage, file))
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()

    def lines(self) -> Iterator[str]:
        """What the last stage prints, as it does, without end.

        Raises:
            JobError: a process ended, or none has printed anything for long.
        """
        with self._logs[-1].open(errors="replace") as file:
            unfinished, since = "", time.monotonic()
            while True:
                if text := file.readline():
                    since = time.monotonic()
                    unfinished += text
                    if unfinished.endswith("\n"):
                        yield unfinished
                        unfinished = ""
                    continue
                for stage, process in enumerate(self._processes):
                    if process.poll() is not None:
                        raise self._failure(stage, f"ended with exit code {process.returncode}")
                if time.monotonic() - since > _STALLED:
                    raise self._failure(self._stages - 1, f"said nothing for {_STALLED:.0f} s")
                time.sleep(0.02)

    def finish(self) -> None:
        """Has the job end after its current step, and write its report.

        Raises:
            JobError: it does not, or fails.
        """
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for stage, process in enumerate(self._processes):
            try:
                code = process.wait(_STALLED)
            except subprocess.TimeoutExpired:
                raise self._failure(stage, "did not end") from None
            if code:
                raise self._failure(stage, f"ended with exit code {code}")

    def _start(self, stage: int, file: IO[bytes]) -> subprocess.Popen[bytes]:
        cores = len(os.sched_getaffinity(0))
        environment: Mapping[str, str] = {
            **os.environ,
            "MASTER_ADDR": self._place.address,
            "MASTER_PORT": "29500",
            "WORLD_SIZE": str(self._stages),
            "RANK": str(stage),
            "LOCAL_RANK": "0",
            "GLOO_SOCKET_IFNAME": self._place.device,
            "OMP_NUM_THREADS": str(max(1, cores // self._stages)),
            "CUDA_VISIBLE_DEVICES": "",
        }
        return subprocess.Popen(
            self._place.enter(stage, self._command), env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _kill(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _failure(self, stage: int, what: str) -> JobError:
        log = self._logs[stage]
        return JobError(f"stage {stage} {what}; from {log}:\n{reason(log, 30)}")
