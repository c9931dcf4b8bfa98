# SPDX-License-Identifier: Apache-2.0
"""How far a training is: a line that is redrawn on a terminal, ten lines a run elsewhere."""

import time

from tqdm import tqdm

from training_log import Step


class Progress:
    """The progress of one run; a context.

    Args:
        name: of the run.
        steps: of the whole training.
        tokens: a step.
        position: the line on the terminal, of several at once.
    """

    def __init__(self, name: str, steps: int, tokens: int, position: int = 0) -> None:
        self._name, self._steps, self._tokens = name, steps, tokens
        self._first: int | None = None
        self._start = time.monotonic()
        self._printed = 0
        self._bar = tqdm(
            total=steps, desc=f"{name} (starting)", unit="step", disable=None, position=position
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """The line stays as it is."""
        self._bar.close()

    def step(self, step: Step) -> None:
        """A step, after others that need not have been reported, is done."""
        now = time.monotonic()
        if self._first is None:  # the start-up, and a first step that is slower, are no measure
            self._first, self._start = step.number, now
            self._printed = step.number * 10 // self._steps
            self._bar.set_description(self._name)
            self._bar.initial = step.number - 1
            self._bar.unpause()
        done, elapsed = step.number - self._first, now - self._start
        speed = f"{done * self._tokens / max(elapsed, 1e-9):,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {step.loss:.3f}, {speed}", refresh=False)
        self._bar.update(step.number - self._bar.n)
        tenth = step.number * 10 // self._steps
        if self._bar.disable and done and tenth > self._printed:
            self._printed = tenth
            left = elapsed / done * (self._steps - step.number)
            print(f"  {self._name}: step {step.number}/{self._steps}, loss {step.loss:.3f}, "
                  f"{speed}, {clock(left)} left", flush=True)  # fmt: skip


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
