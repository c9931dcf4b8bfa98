# SPDX-License-Identifier: Apache-2.0
"""What the slow-network bench shows while it runs: where it is, and how long it will still take."""

import sys
import time
from collections.abc import Sequence

from slow_network_job import Course
from slow_network_plan import (
    START_UP,
    Effort,
    Setting,
    Sizes,
    expected_seconds,
    expected_step,
    phases,
)


class Progress:
    """One line that is redrawn on a terminal; elsewhere a line at the end of each phase."""

    def __init__(self, sizes: Sizes, effort: Effort, jobs: Sequence[tuple[Setting, bool]]) -> None:
        """
        Args:
            jobs: the trainings to come, True for those over an emulated link.
        """
        uncompressed = expected_step(sizes, jobs[0][0], effort.curve_mbit) if jobs else 0.0
        curve_seconds = effort.curve_steps * uncompressed
        self._expected = []
        for setting, emulated in jobs:
            if emulated:
                step = expected_step(sizes, setting, effort.lowest)
                self._expected.append(START_UP + max(effort.target, (2 + effort.least) * step))
            else:
                planned = phases(sizes, setting, effort, curve_seconds)
                self._expected.append(expected_seconds(sizes, setting, planned))
        self._begin = time.monotonic()
        self._job, self._job_begin = -1, self._begin
        self._live = sys.stdout.isatty()
        self.say(f"{len(jobs)} trainings, about {_clock(sum(self._expected))}")

    def start(self, setting: Setting, emulated: bool) -> None:
        """The next training starts."""
        self._job += 1
        self._job_begin = time.monotonic()
        what = f"{setting.name}, emulated link" if emulated else setting.name
        self.say(f"[{self._job + 1}/{len(self._expected)}] {what}, {_clock(self.left())} left")

    def step(self, course: Course) -> None:
        """A step is done."""
        phase, timed = course.phase, course.steps[-1]
        where = "unlimited" if phase.mbit is None else f"{phase.mbit:g} Mbit/s"
        last = course.all_steps[-1]
        done = f"step {len(timed)}/{phase.steps}"
        if phase.seconds:
            done = f"step {len(timed)}, {sum(s.seconds for s in timed):.0f}/{phase.seconds:.0f} s"
        text = f"      {where:>12}: {done}, {last.seconds:.2f} s, loss {last.loss:.3f}, "
        text += f"{_clock(self.left())} left"
        if course.phase_is_over:
            self.say(text)
        elif self._live:
            print(f"\r\033[K{text}", end="", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\033[K{text}" if self._live else text, flush=True)

    def left(self) -> float:
        """Seconds that the rest will take, judged by how the plan fared so far."""
        now = time.monotonic()
        before = sum(self._expected[: self._job])
        pace = (self._job_begin - self._begin) / before if self._job > 0 else 1.0
        rest = sum(self._expected[max(0, self._job) :]) * pace
        return max(0.0, rest - (now - self._job_begin))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
