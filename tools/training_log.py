# SPDX-License-Identifier: Apache-2.0
"""What Megatron's log says of a training: its steps, its validation losses, why it failed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_STEP = re.compile(
    r"iteration\s+(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: (\S+)"
)
# Not what Megatron says of the test set.
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+)( on validation set)? \| lm loss value: (\S+)"
)
_ERROR = re.compile(r"Traceback|[Ee]rror: ")


@dataclass(frozen=True)
class Step:
    """A step as the log has it; with --log-interval above 1, means over the steps up to it.

    Attributes:
        number: counted from 1.
        seconds: of one step.
        loss: cross-entropy, nats a token.
    """

    number: int
    seconds: float
    loss: float


def parse_step(line: str) -> Step | None:
    """The step that a line of Megatron's log reports."""
    found = _STEP.search(line)
    return Step(int(found[1]), float(found[2]) / 1000, float(found[3])) if found else None


@dataclass
class TrainingLog:
    """What has been logged so far. Of what a resumed run did twice, the later line holds.

    Attributes:
        steps: by number.
        validation: validation loss by step.
        finished: the step after which the evaluation at the end of training was made, or None.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    finished: int | None = None

    @classmethod
    def of(cls, lines: Iterable[str]) -> "TrainingLog":
        """All of a log."""
        log = cls()
        for line in lines:
            log.read(line)
        return log

    def read(self, line: str) -> Step | None:
        """Takes in one line; the step, if it reports one."""
        if step := parse_step(line):
            self.steps[step.number] = step
        elif found := _VALIDATION.search(line):
            self.validation[int(found[1])] = float(found[3])
            if found[2]:
                self.finished = int(found[1])
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
        """All steps' time; start-up, evaluations and saves are not in it."""
        numbers = sorted(self.steps)
        pairs = zip([0, *numbers], numbers, strict=False)
        return sum((number - before) * self.steps[number].seconds for before, number in pairs)

    @property
    def median_step(self) -> float:
        """Seconds of the median step, which start-ups do not touch."""
        return median(step.seconds for step in self.steps.values())


def reason(log: Path, count: int = 40) -> str:
    """The part of a log that says why: from the first traceback or error on, else its end."""
    lines = log.read_text(errors="replace").splitlines()
    errors = (number for number, line in enumerate(lines) if _ERROR.search(line))
    first = next(errors, max(0, len(lines) - count))
    return "\n".join(lines[first : first + count])
