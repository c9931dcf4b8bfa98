# SPDX-License-Identifier: Apache-2.0
"""One process of a simulated pipeline: what it computes, sends and receives."""

from event_messages import Process, Signal
from event_simulation import Simulation
from pipeline_step import Step

#: What channels carry, beside the number of the link.
FORWARD, BACKWARD = "forward", "backward"
STEP_ONWARD, STEP_BACK = "once a step, onward", "once a step, back"


class Stage:
    """One process: its computations, sends and receives.

    Args:
        process: p; chunk v of its model is chunk v·P + p of all.
    """

    def __init__(self, simulation: Simulation, step: Step, process: int) -> None:
        self._simulation, self.step, self.process = simulation, step, process
        self._previous = (process - 1) % step.processes

    @property
    def leads(self) -> bool:
        """Whether it is the first process."""
        return self.process == 0

    @property
    def ends(self) -> bool:
        """Whether it is the last process."""
        return self.process == self.step.processes - 1

    def is_first(self, chunk: int) -> bool:
        """Whether its chunk has the embedding, and receives nothing forward."""
        return self.leads and chunk == 0

    def is_last(self, chunk: int) -> bool:
        """Whether its chunk has the loss, and sends nothing forward."""
        return self.ends and chunk == self.step.virtual_stages - 1

    def forward(self, chunk: int) -> float:
        """Seconds."""
        return self.step.chunks[self._number(chunk)].forward

    def backward(self, chunk: int) -> float:
        """Seconds."""
        return self.step.chunks[self._number(chunk)].backward

    def send_forward(self, chunk: int) -> list[Signal]:
        """What leaves the chunk for the next one, if there is one."""
        if self.is_last(chunk):
            return []
        size = self.step.boundaries[self._number(chunk)].forward
        return [self._simulation.send((FORWARD, self.process), size)]

    def send_backward(self, chunk: int) -> list[Signal]:
        """What leaves the chunk for the one before, if there is one."""
        if self.is_first(chunk):
            return []
        size = self.step.boundaries[self._number(chunk) - 1].backward
        return [self._simulation.send((BACKWARD, self._previous), size)]

    def receive_forward(self) -> Signal:
        """From the process before."""
        return self._simulation.receive((FORWARD, self._previous))

    def receive_backward(self) -> Signal:
        """From the process after."""
        return self._simulation.receive((BACKWARD, self.process))

    def exchange(self) -> Process:
        """What the two sides of each boundary tell each other once a step."""
        signals = []
        for chunk in range(self.step.virtual_stages):
            number = self._number(chunk)
            if not self.is_last(chunk):
                boundary = self.step.boundaries[number]
                out, into = (STEP_ONWARD, boundary.step_onward), (STEP_BACK, boundary.step_back)
                signals += self._exchange(self.process, out, into)
            if not self.is_first(chunk):
                boundary = self.step.boundaries[number - 1]
                out, into = (STEP_BACK, boundary.step_back), (STEP_ONWARD, boundary.step_onward)
                signals += self._exchange(self._previous, out, into)
        yield from signals

    def _exchange(self, link: int, out: tuple[str, float], into: tuple[str, float]) -> list[Signal]:
        signals = []
        if out[1]:
            signals.append(self._simulation.send((out[0], link), out[1]))
        if into[1]:
            signals.append(self._simulation.receive((into[0], link)))
        return signals

    def _number(self, chunk: int) -> int:
        return chunk * self.step.processes + self.process
