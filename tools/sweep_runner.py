# SPDX-License-Identifier: Apache-2.0
"""Runs the runs of a sweep, several at once if there are GPUs for it, until done or stopped."""

import os
import signal
import time
from collections.abc import Collection, Sequence
from types import FrameType

from sweep_job import Job, RunFolder
from sweep_list import SweepError, SweepList
from training_progress import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PAUSE = 0.1  # seconds between two looks at the jobs

#: What Megatron's index of a dataset depends on: the seed, and how many samples there will be.
Samples = tuple[int, int]


class Stopping:
    """Ctrl-C, SIGTERM, SIGHUP and the time limit; a context.

    Attributes:
        why: the reason to stop, None as long as there is none.
        at_once: whether there was a second signal.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._seconds = seconds
        self._signal: str | None = None
        self.at_once = False

    def __enter__(self) -> "Stopping":
        self._before = [(number, signal.signal(number, self._note)) for number in _SIGNALS]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self._signal is not None
        self._signal = signal.Signals(number).name

    @property
    def why(self) -> str | None:
        if self._signal:
            return self._signal
        if self._end is not None and time.monotonic() >= self._end:
            return f"--seconds {self._seconds:g}"
        return None


def devices(workers: int, processes: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each worker: as many GPUs as a run has processes.

    Raises:
        SweepError: CUDA_VISIBLE_DEVICES names fewer.
    """
    if workers == 1:
        return [None]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(workers * processes)]
    if len(names) < workers * processes:
        raise SweepError(
            f"--workers {workers} need {workers * processes} GPUs, but CUDA_VISIBLE_DEVICES is "
            f"{given}; name as many, or give fewer workers"
        )
    return [",".join(names[n * processes : (n + 1) * processes]) for n in range(workers)]


def run_all(
    folders: Sequence[RunFolder], sweep: SweepList, *, workers: int, seconds: float | None
) -> str | None:
    """Trains runs that are neither finished nor crashed.

    Returns:
        why it stopped before all were done, or None.

    Raises:
        SweepError: there are not enough GPUs for the workers.
    """
    places = devices(workers, sweep.processes)
    waiting = list(folders)
    running: dict[int, tuple[Job, Progress]] = {}
    indexed: set[Samples] = set()
    with Stopping(seconds) as stopping:
        try:
            while running or (waiting and stopping.why is None):
                for worker in range(workers):
                    if worker in running or stopping.why is not None:
                        continue
                    folder = take_next(
                        waiting, [job.folder for job, _ in running.values()], indexed
                    )
                    if folder and (job := _start(folder, sweep, places[worker], workers)):
                        run = folder.run
                        line = Progress(run.name, run.steps, run.tokens_per_step, worker)
                        running[worker] = job, line
                for worker, (job, line) in list(running.items()):
                    ended = job.ended  # asked before its last lines are read
                    if _follow(job, line):
                        indexed.add(_samples(job.folder))
                    if ended:
                        del running[worker]
                        line.close()
                        job.settle()
                        _say_what_became(job.folder)
                    elif stopping.at_once:
                        job.kill()
                    elif stopping.why is not None:
                        job.tell_to_stop()
                time.sleep(_PAUSE)
            return stopping.why
        finally:
            for job, line in running.values():
                line.close()
                job.kill()


def _samples(folder: RunFolder) -> Samples:
    return folder.run.seed, folder.run.tokens


def take_next(
    waiting: list[RunFolder], running: Sequence[RunFolder], indexed: Collection[Samples]
) -> RunFolder | None:
    """Takes the next run out of those that wait, or none for the moment.

    Jobs that start together would write one index of the dataset at once, and read it half written:
    the first one is let come to a step before others with the same index start.

    Args:
        indexed: of which a job has come to a step.
    """
    indexing = {_samples(folder) for folder in running}.difference(indexed)
    for folder in waiting:
        if _samples(folder) not in indexing:
            waiting.remove(folder)
            return folder
    return None


def _start(folder: RunFolder, sweep: SweepList, devices: str | None, workers: int) -> Job | None:
    """None if another call has trained it in the meantime, or is training it."""
    if folder.result is not None:
        return None
    try:
        return Job(folder, sweep, devices=devices, share=workers)
    except SweepError as error:
        print(f"{folder.run.name}: left out: {error}", flush=True)
        return None


def _follow(job: Job, line: Progress) -> bool:
    """Whether it has come to a step."""
    stepped = False
    for text in job.lines():
        if step := job.seen.read(text):
            line.step(step)
            stepped = True
    return stepped


def _say_what_became(folder: RunFolder) -> None:
    if (result := folder.result) is not None:
        said = f"validation loss {result['validation'][-1][1]:.4f}"
    elif failure := folder.failure:
        said = f"crashed ({failure}); see {folder.log}, and --retry"
    else:
        said = "stopped; the next call goes on with it"
    print(f"{folder.run.name}: {said}", flush=True)
