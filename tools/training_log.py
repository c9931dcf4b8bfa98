# SPDX-License-Identifier: Apache-2.0
"""What Megatron's log says of a training: its steps, its validation losses, why it failed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

_STEP = re.compile(
    r"iteration\s+(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: (\S+)"
)
# Not what Megatron says of the test set.
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+)( on validation set)? \| lm loss value: (\S+)"
)
# Once in each process of a run, before its first step.
_START = "[before the start of training step]"
_ERROR = re.compile(r"Traceback|[Ee]rror: ")


@dataclass(frozen=True)
class Step:
    """A step as the log has it; with --log-interval above 1, means over the last steps.

    Attributes:
        number: counted from 1.
        seconds: of one step.
        loss: cross-entropy, nats a token.
        steps: how many these are means over.
    """

    number: int
    seconds: float
    loss: float
    steps: int = 1


def parse_step(line: str) -> Step | None:
    """The step that a line of Megatron's log reports."""
    found = _STEP.search(line)
    return Step(int(found[1]), float(found[2]) / 1000, float(found[3])) if found else None


@dataclass
class TrainingLog:
    """What has been logged so far. Of what a resumed run did twice, the later lines hold.

    Megatron logs the first step of each process by itself, and then counts it again into the means
    of the next line, from which it is taken out here.

    Attributes:
        steps: by number.
        validation: validation loss by step.
        finished: the step after which the evaluation at the end of training was made, or None.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    finished: int | None = None
    _starting: bool = True
    _opening: Step | None = None
    _last: int = 0

    @classmethod
    def of(cls, lines: Iterable[str]) -> "TrainingLog":
        """All of a log."""
        log = cls()
        for line in lines:
            log.read(line)
        return log

    def read(self, line: str) -> Step | None:
        """Takes in one line; the step, if it reports one."""
        if _START in line:
            self._starting = True
        elif step := parse_step(line):
            return self._take(step)
        elif found := _VALIDATION.search(line):
            self.validation[int(found[1])] = float(found[3])
            if found[2]:
                self.finished = int(found[1])
        return None

    def _take(self, step: Step) -> Step:
        if self._starting:
            self._starting, self._opening = False, step
            self.steps = {n: known for n, known in self.steps.items() if n < step.number}
            self.validation = {n: loss for n, loss in self.validation.items() if n < step.number}
        else:
            step = replace(step, steps=step.number - self._last)
            if self._opening is not None:
                step = _without(self._opening, step)
                self._opening = None
        self._last = step.number
        self.steps[step.number] = step
        return step

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Training loss by step."""
        return [(number, self.steps[number].loss) for number in sorted(self.steps)]

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Validation loss by step."""
        return sorted(self.validation.items())

    @property
    def seconds(self) -> float:
        """All steps' time, those that were stopped before they were logged like the others.

        Start-up, evaluations and saves are not in it.
        """
        logged = sum(step.steps for step in self.steps.values())
        seconds = sum(step.steps * step.seconds for step in self.steps.values())
        return seconds / logged * max(self.steps)

    @property
    def median_step(self) -> float:
        """Seconds of the median step, which start-ups do not touch."""
        return median(step.seconds for step in self.steps.values())


def _without(first: Step, means: Step) -> Step:
    """Means over the steps after the first from those that have it in them."""
    count = means.steps
    return replace(
        means,
        seconds=(means.seconds * (count + 1) - first.seconds) / count,
        loss=(means.loss * (count + 1) - first.loss) / count,
    )


def reason(log: Path, count: int = 40) -> str:
    """The part of a log that says why: from the first traceback or error on, else its end."""
    lines = log.read_text(errors="replace").splitlines()
    errors = (number for number, line in enumerate(lines) if _ERROR.search(line))
    first = next(errors, max(0, len(lines) - count))
    return "\n".join(lines[first : first + count])
