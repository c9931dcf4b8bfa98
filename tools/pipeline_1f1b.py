# SPDX-License-Identifier: Apache-2.0
"""What a process does in one step without virtual stages: Megatron's 1F1B schedule, simulated.

Plain Megatron waits for each transfer where it stands; boundaries that receive ahead
(`megatron/mapl/transfers.py`) keep some under way.
"""

from collections import deque

from event_messages import Process, Signal
from pipeline_stage import Stage


class _Transfers:
    """Calls of Megatron's communicator without virtual stages, in each of which it waits."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def call(
        self, *, to_next: bool = False, to_previous: bool = False,
        from_next: bool = False, from_previous: bool = False,
    ) -> Process:  # fmt: skip
        """One call; what the stage has no neighbour for is left out."""
        stage = self._stage
        signals = [*(stage.send_forward(0) if to_next else ()),
                   *(stage.send_backward(0) if to_previous else ())]  # fmt: skip
        if from_previous and not stage.leads:
            signals.append(stage.receive_forward())
        if from_next and not stage.ends:
            signals.append(stage.receive_backward())
        yield from signals

    def drain(self) -> Process:
        """At the end of the schedule."""
        yield from ()


class _TransfersAhead(_Transfers):
    """The same with up to `depth` payloads of each direction under way."""

    def __init__(self, stage: Stage, depth: int) -> None:
        super().__init__(stage)
        self._depth = depth
        self._to_come = {
            "previous": 0 if stage.leads else stage.step.micro_batches,
            "next": 0 if stage.ends else stage.step.micro_batches,
        }
        self._receiving: dict[str, deque[Signal]] = {"previous": deque(), "next": deque()}
        self._sending: dict[str, deque[Signal]] = {"previous": deque(), "next": deque()}

    def call(
        self, *, to_next: bool = False, to_previous: bool = False,
        from_next: bool = False, from_previous: bool = False,
    ) -> Process:  # fmt: skip
        stage = self._stage
        if self._is_idle(to_next, to_previous, from_next, from_previous):
            return  # Megatron does not call its communicator
        for side in self._receiving:
            self._post(side)
        sends = [("previous", stage.send_backward(0) if to_previous else []),
                 ("next", stage.send_forward(0) if to_next else [])]  # fmt: skip
        for side, signals in sends:
            self._sending[side].extend(signals)
            while len(self._sending[side]) > self._depth:
                yield self._sending[side].popleft()
        for side, due in (("previous", from_previous), ("next", from_next)):
            if due and self._receiving[side]:
                yield self._receiving[side].popleft()
                self._post(side)

    def drain(self) -> Process:
        for sending in self._sending.values():
            yield from sending

    def _is_idle(self, to_next: bool, to_previous: bool, from_next: bool, from_previous: bool
                 ) -> bool:  # fmt: skip
        next_side = (to_next or from_next) and not self._stage.ends
        return not (next_side or ((to_previous or from_previous) and not self._stage.leads))

    def _post(self, side: str) -> None:
        receive = {"previous": self._stage.receive_forward, "next": self._stage.receive_backward}
        while self._to_come[side] and len(self._receiving[side]) < self._depth:
            self._to_come[side] -= 1
            self._receiving[side].append(receive[side]())


def one_forward_one_backward(stage: Stage) -> Process:
    """Megatron's schedule without virtual stages."""
    step = stage.step
    depth = step.receive_ahead
    transfers = _TransfersAhead(stage, depth) if depth else _Transfers(stage)
    warm_up = min(step.processes - stage.process - 1, step.micro_batches)
    steady = step.micro_batches - warm_up
    for _ in range(warm_up):
        yield from transfers.call(from_previous=True)
        yield stage.forward(0)
        yield from transfers.call(to_next=True)
    if steady:
        yield from transfers.call(from_previous=True)
    for left in reversed(range(steady)):
        yield stage.forward(0)
        yield from transfers.call(to_next=True, from_next=True)
        yield stage.backward(0)
        yield from transfers.call(to_previous=True, from_previous=left > 0)
    for _ in range(warm_up):
        yield from transfers.call(from_next=True)
        yield stage.backward(0)
        yield from transfers.call(to_previous=True)
    yield from transfers.drain()
    yield from stage.exchange()
