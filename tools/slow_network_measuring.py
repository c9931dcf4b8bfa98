# SPDX-License-Identifier: Apache-2.0
"""The measurements of the slow-network bench: trains a setting and books what it showed."""

import json
import re
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

import slow_network_plan as plan
from mapl.files import TRAFFIC_FILE
from report_files import ReportError
from report_runs import load_counted
from shaped_hosts import ShapedHosts
from slow_network_goodput import goodput
from slow_network_job import Course, JobError, Place, Training
from slow_network_progress import Progress
from slow_network_results import Results, Timing, Traffic
from training_log import parse_step


class Measuring:
    """What all measurements of one call of the bench share."""

    def __init__(
        self, hosts: ShapedHosts, results: Results, effort: plan.Effort, data: Sequence[str],
        output: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self._hosts, self.results, self._effort, self._data = hosts, results, effort, data
        self._output, self._progress = output, progress
        self._curve_seconds: float | None = None

    def measure_links(self) -> None:
        """The payload that the links carry, without Megatron."""
        for mbit in self._effort.bandwidths:
            self._hosts.shape(mbit)
            second = round(mbit * 1e6 / 8)
            tries = [goodput(self._hosts, 0, 1, second) for _ in range(3)]
            self.results.goodput[mbit] = statistics.median(tries)

    def measure(self, setting: plan.Setting) -> None:
        """All bandwidths, in one training.

        Raises:
            JobError: the training failed.
        """
        sizes, results = self.results.sizes, self.results
        phases = plan.phases(sizes, setting, self._effort, self._curve_seconds)
        place = Place(self._hosts.run_on, self._hosts.addresses[0], self._hosts.device)
        course, counted = self._train(setting, phases, place, [])
        for phase, steps, (links, control) in zip(phases, course.steps, counted, strict=True):
            seconds = [step.seconds for step in steps]
            results.timings.append(
                Timing(setting.name, phase.mbit, "shaped", seconds,
                       links / len(steps), control / len(steps))
            )  # fmt: skip
        if setting.curve:
            count = phases[0].discard + len(course.steps[0])
            curve: list[tuple[float, float]] = []
            clock = 0.0
            for step in course.all_steps[:count]:
                # The first step has start-up in it, which is the same for all.
                clock += step.seconds if curve else 0.0
                curve.append((clock, step.loss))
            results.curves[setting.name] = curve
            if setting.name == plan.UNCOMPRESSED:
                self._curve_seconds = sum(step.seconds for step in course.steps[0])
        results.traffic[setting.name] = self._traffic(setting)

    def emulate(self, setting: plan.Setting) -> None:
        """The same over loopback, with an emulated link of the lowest bandwidth.

        The emulation knows no headers: it is given what the shaped link carries besides them.

        Raises:
            JobError: the training failed.
        """
        mbit = self._effort.lowest
        # The planned number of steps is that of the bandwidth, which this job has from the start.
        planned = plan.phases(self.results.sizes, replace(setting, curve=False), self._effort, None)
        steps = next(phase.steps for phase in planned if phase.mbit == mbit)
        place = Place(lambda _, command: self._hosts.run_on(None, command), "127.0.0.1", "lo")
        flags = ["--mapl-emulate-bandwidth", f"{self.results.goodput[mbit]:.3f}"]
        emulated = replace(setting, name=f"{setting.name}, emulated")
        course, _ = self._train(emulated, [plan.Phase(mbit, 2, steps)], place, flags)
        seconds = [step.seconds for step in course.steps[0]]
        self.results.timings.append(Timing(setting.name, mbit, "emulated", seconds))

    def _train(
        self, setting: plan.Setting, phases: Sequence[plan.Phase], place: Place,
        more: Sequence[str],
    ) -> tuple[Course, list[tuple[int, int]]]:  # fmt: skip
        """Trains through all phases; bytes on links and on the control network in each."""
        flags = [*self.results.sizes.flags(), *self._data, *setting.flags.split(), *more]
        if setting.flags:
            flags += ["--mapl-report-dir", str(self._report(setting))]
        log = self._output / "logs" / f"{_file_name(setting.name)}.log"
        course = Course(phases)
        counted = []
        before = (0, 0)
        others = _OtherPrograms()
        self._hosts.shape(course.phase.mbit)
        with Training(flags, self.results.sizes.stages, place, log) as training:
            for line in training.lines():
                if (step := parse_step(line)) is None:
                    continue
                done = course.take(step)
                self._progress.step(course)
                if course.about_to_time:
                    before = self._count()
                if done:
                    links, control = self._count()
                    counted.append((links - before[0], control - before[1]))
                    if not course.next_phase():
                        break
                    self._hosts.shape(course.phase.mbit)
            self._hosts.shape(None)  # for a quick end
            training.finish()
        self.results.other_programs[setting.name] = others.share()
        return course, counted

    def _count(self) -> tuple[int, int]:
        sent = self._hosts.bytes_sent()
        control = sum(n for (_, device), n in sent.items() if device == self._hosts.device)
        return sum(sent.values()) - control, control

    def _report(self, setting: plan.Setting) -> Path:
        return self._output / "reports" / _file_name(setting.name)

    def _traffic(self, setting: plan.Setting) -> Traffic:
        sizes = self.results.sizes
        if not setting.flags:  # plain Megatron reports nothing; the size of its tensors is known
            busiest = sizes.micro_batches * sizes.payload_bytes
            return Traffic(sizes.step_bytes, sizes.step_bytes, busiest)
        directory = self._report(setting)
        try:
            run = load_counted(directory)
            steps = json.loads((directory / TRAFFIC_FILE).read_bytes())["steps"]
        except ReportError as error:
            raise JobError(str(error)) from None
        assert run.traffic is not None and run.uncompressed is not None
        # All links are alike, and each side of one sends its part of the projector's gradient.
        links = sizes.stages - 1
        one_way = max(run.traffic.forward, run.traffic.backward) + run.traffic.projector / 2
        return Traffic(
            run.traffic.total / steps, run.uncompressed.total / steps, one_way / links / steps
        )


class _OtherPrograms:
    """What others use of the processors, from its making on. It slows down what is computed here.

    Children count as our own once they have ended.
    """

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """Of all processor time; other virtual machines' included, and the kernel's networking."""
        available = (time.monotonic() - self._start) * (psutil.cpu_count() or 1)
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / available)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
