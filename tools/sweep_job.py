# SPDX-License-Identifier: Apache-2.0
"""One run of a sweep: its folder, and the job that trains it or goes on where it was stopped.

log.txt          what all its processes have printed, of all parts one after the other
run.json         its flags, written before it starts
report/          its run report; part-N.json: the traffic of its N-th part, if it was resumed
checkpoint/      deleted when it is finished
failure.json     why it crashed, until it is retried
result.json      written last, when it is finished
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from mapl.files import TRAFFIC_FILE, write_atomically
from sweep_list import Run, SweepError, SweepList
from sweep_traffic import token_traffic
from training_log import TrainingLog, reason
from training_process import ROOT, alone, environment, stop

#: The script that trains.
TRAINER = ROOT / "pretrain_gpt.py"

# A step, and a checkpoint, take no longer than this after a signal.
_GRACE = 600.0


class RunFolder:
    """What is there of a run."""

    def __init__(self, run: Run, sweep: Path) -> None:
        self.run = run
        self.path = sweep / run.name
        self.log = self.path / "log.txt"
        self.report = self.path / "report"
        self.checkpoint = self.path / "checkpoint"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it came to, if it is finished."""
        return self._load("result.json")

    @property
    def failure(self) -> str | None:
        """Why it crashed, in one line, if it did and was not retried."""
        failure = self._load("failure.json")
        return None if failure is None else str(failure["reason"])

    @property
    def begun(self) -> bool:
        """Whether it was ever started."""
        return (self.path / "run.json").exists()

    def check_flags(self, listed: Path) -> None:
        """Compares its flags with those of an earlier call.

        Raises:
            SweepError: they are not the same; names the difference and the remedy.
        """
        before = self._load("run.json")
        if before is None or same_flags(before["flags"], self.run.flags):
            return
        was, now = _readable(before["flags"]), _readable(self.run.flags)
        gone = " ".join(flag for flag in was if flag not in now)
        new = " ".join(flag for flag in now if flag not in was)
        raise SweepError(
            f'{listed}: run "{self.run.name}": its flags are not those that {self.path} was made '
            f"with: it had {gone or 'another order'!r}, the list has {new or 'another order'!r}; "
            f"put them back, or add --redo {self.run.setting} to delete that folder and train anew"
        )

    def delete(self) -> None:
        """All of it."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def forget_failure(self) -> None:
        """Has it go on from its last checkpoint, if there is one."""
        (self.path / "failure.json").unlink(missing_ok=True)

    def fail(self, why: str) -> None:
        """Notes that it crashed."""
        write_atomically(self.path / "failure.json", json.dumps({"reason": why}) + "\n")

    def set_report_aside(self) -> None:
        """Keeps the traffic of an earlier part, which the next one would overwrite."""
        if (self.report / TRAFFIC_FILE).exists():
            number = len(list(self.report.glob("part-*.json"))) + 1
            (self.report / TRAFFIC_FILE).rename(self.report / f"part-{number}.json")

    def finish(self, seen: TrainingLog, *, keep_checkpoint: bool) -> None:
        """Writes the result.

        Raises:
            ValueError: there is no report of its traffic, or a damaged one.
        """
        run = self.run
        result = {
            **dataclasses.asdict(run),
            "tokens": run.tokens,
            "losses": seen.losses,
            "validation": seen.validations,
            "seconds": seen.seconds,
            "tokens_per_second": run.tokens_per_step / seen.median_step,
            "traffic": None if run.uncompressed else self._traffic(),
        }
        write_atomically(self.path / "result.json", json.dumps(result, indent=1) + "\n")
        if not keep_checkpoint and self.checkpoint.exists():
            shutil.rmtree(self.checkpoint)

    def _traffic(self) -> dict[str, Any]:
        files = [*sorted(self.report.glob("part-*.json")), self.report / TRAFFIC_FILE]
        try:
            return dataclasses.asdict(token_traffic(json.loads(file.read_text()) for file in files))
        except (OSError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{self.report} has no whole traffic report: {error!r}") from None

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SweepError(f"{path} is damaged: {error}; delete {self.path} to train it anew, or "
                             f"add --redo {self.run.setting}") from None  # fmt: skip
        return content


class Job:
    """The processes of a run, from here to its end or until they are told to stop.

    Args:
        devices: CUDA_VISIBLE_DEVICES, or None to leave it as it is.
        share: the part of the cores that it may have, 1 of so many.

    Raises:
        SweepError: another sweep is running it.
    """

    def __init__(
        self, folder: RunFolder, sweep: SweepList, *, devices: str | None, share: int
    ) -> None:
        self.folder, self._sweep = folder, sweep
        self._told: float | None = None
        self._unread = ""
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.log.open("ab") as log:
            # The job's processes have this open file as their output and hold the lock with it.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SweepError(f"{folder.path} is being trained by another call; wait until it "
                                 "ends, or end it") from None  # fmt: skip
            folder.set_report_aside()
            write_atomically(
                folder.path / "run.json", json.dumps({"flags": folder.run.flags}, indent=1) + "\n"
            )
            self._from = log.tell()
            self._reader: IO[str] = folder.log.open(errors="replace")
            self.seen = TrainingLog.of(self._reader)
            self._process = self._start(log, devices, share)

    def _start(self, log: IO[bytes], devices: str | None, share: int) -> subprocess.Popen[str]:
        processes = self._sweep.processes
        variables = environment(processes * share)
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes)]
        else:
            variables = alone(variables)
        # A session of its own: Ctrl-C reaches the sweep alone, which then stops the job in order.
        return subprocess.Popen(
            [*command, str(TRAINER), *self.flags()], env=variables, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def flags(self) -> list[str]:
        """Of the script: those of the run, and those for stopping it and going on."""
        folder = self.folder
        own = ["--exit-signal-handler", "--save", str(folder.checkpoint)]
        own += ["--save-interval", str(self._sweep.save_interval)]
        # Of no checkpoint's number: Megatron deletes each once it has written the next.
        own += ["--save-retain-interval", str(self._sweep.save_interval * folder.run.steps)]
        if (folder.checkpoint / "latest_checkpointed_iteration.txt").exists():
            own += ["--load", str(folder.checkpoint)]
        if not folder.run.uncompressed:  # plain Megatron counts nothing
            own += ["--mapl-report-dir", str(folder.report)]
        return [*folder.run.flags, *own]

    def lines(self) -> list[str]:
        """What it has printed since the last call."""
        text = self._unread + self._reader.read()
        *lines, self._unread = text.split("\n")
        return lines

    @property
    def ended(self) -> bool:
        """Whether none of its processes is left."""
        return self._process.poll() is not None

    def tell_to_stop(self) -> None:
        """Has Megatron save after its current step and end; by force if it takes too long."""
        if self._told is None:
            self._told = time.monotonic()
            for worker in self._workers():
                with suppress(psutil.NoSuchProcess):
                    worker.terminate()
        elif time.monotonic() - self._told > _GRACE:
            self.kill()

    def _workers(self) -> Sequence[psutil.Process]:
        """The processes that train, not those that load their data; torchrun would not wait."""
        try:
            leader = psutil.Process(self._process.pid)
            return (leader.children() if self._sweep.processes > 1 else []) or [leader]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Ends it now; what it has not saved is lost."""
        stop(self._process, timeout=1)

    def settle(self) -> None:
        """Notes what became of it: finished, crashed, or to be gone on with."""
        self._reader.close()
        code = self._process.returncode
        folder = self.folder
        if code == 0 and self.seen.finished == folder.run.steps:
            try:
                folder.finish(self.seen, keep_checkpoint=self._sweep.keep_checkpoints)
            except ValueError as error:
                folder.fail(str(error))
        elif code and self._told is None:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            folder.fail(f"{how}: {self._brief()}")

    def _brief(self) -> str:
        """The error of this part of the log, in one line."""
        part = self.folder.path / "last-part.txt"
        with self.folder.log.open("rb") as log:
            log.seek(self._from)
            part.write_bytes(log.read())
        lines = [line.strip() for line in reason(part).splitlines() if line.strip()]
        os.unlink(part)
        errors = [line for line in lines if "rror: " in line]
        return (errors or lines or ["it printed nothing"])[-1]


def same_flags(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether the flags are the same; a dataset that is not given may be any."""
    pairs = zip(before, now, strict=False)
    known = all(a == b or "{data}" in b or "{cache}" in b for a, b in pairs)
    return known and len(before) == len(now)


def _readable(flags: Sequence[str]) -> list[str]:
    """Flags with their values, each in one string."""
    joined: list[str] = []
    for word in flags:
        if word.startswith("--") or not joined:
            joined.append(word)
        else:
            joined[-1] += f" {word}"
    return joined
