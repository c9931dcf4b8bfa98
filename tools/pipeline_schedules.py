# SPDX-License-Identifier: Apache-2.0
"""What a process of a pipeline does in one step: Megatron's two 1F1B schedules, as processes.

Without virtual stages, plain Megatron waits for each transfer where it stands; boundaries that
receive ahead (`megatron/mapl/transfers.py`) keep some under way. With virtual stages Megatron
overlaps transfers between its warm-up and its cool-down, but waits for what it sends forward, since
it frees that memory.
"""

from collections import deque
from collections.abc import Iterator

from event_simulation import Process, Signal, Simulation
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


class _Order:
    """In which order a process computes its chunks of all micro-batches, in groups of P.

    Attributes:
        total: virtual micro-batches: m V.
        warm_up: of these, before the first backward pass.
    """

    def __init__(self, stage: Stage) -> None:
        step = stage.step
        size, chunks = step.processes, step.virtual_stages
        self._stage, self._size, self._chunks = stage, size, chunks
        self.total = step.micro_batches * chunks
        self.warm_up = min((size - stage.process - 1) * 2 + (chunks - 1) * size, self.total)

    def chunk(self, number: int, *, backward: bool = False) -> int:
        """The chunk of a virtual micro-batch."""
        chunk = number // self._size % self._chunks
        return self._chunks - 1 - chunk if backward else chunk

    def receives(self, number: int, *, backward: bool = False) -> bool:
        """Whether the one after `number` comes from another process, which has begun to send.

        The process that a pass starts from gets what went through all others, P − 1 later.
        """
        if number == self.total - 1:
            return False
        if not (self._stage.ends if backward else self._stage.leads):
            return True
        behind = number - (self._size - 1)
        final = 0 if backward else self._chunks - 1
        return behind >= 0 and self.chunk(behind, backward=backward) != final


def interleaved(stage: Stage) -> Process:
    """Megatron's schedule with virtual stages, its transfers overlapped."""
    order = _Order(stage)
    receiving: deque[Signal] = deque()  # forward
    gradients: deque[Signal] = deque()
    sent_back: list[Signal] = []
    if not stage.leads:
        yield stage.receive_forward()
    for k in range(order.warm_up):
        yield stage.forward(order.chunk(k))
        signals = stage.send_forward(order.chunk(k))
        if order.receives(k):
            signals.append(stage.receive_forward())
        yield from signals
    if 0 < order.warm_up < order.total and not stage.ends:
        gradients.append(stage.receive_backward())
    for k in range(order.total - order.warm_up):
        ahead = k + order.warm_up
        if not stage.is_first(order.chunk(ahead)):
            yield from _oldest(receiving)
        yield stage.forward(order.chunk(ahead))
        sent = stage.send_forward(order.chunk(ahead))
        if order.receives(ahead):
            receiving.append(stage.receive_forward())
        yield from sent
        chunk = order.chunk(k, backward=True)
        if not stage.is_last(chunk):
            yield from _oldest(gradients)
        yield stage.backward(chunk)
        last_sent, sent_back = sent_back, stage.send_backward(chunk)
        if order.receives(k, backward=True):
            gradients.append(stage.receive_backward())
        yield from last_sent
    if order.warm_up == order.total and not stage.ends:
        yield stage.receive_backward()
    for k in range(order.total - order.warm_up, order.total):
        chunk = order.chunk(k, backward=True)
        if not stage.is_last(chunk) and k:
            yield from _oldest(gradients)
        yield stage.backward(chunk)
        signals = stage.send_backward(chunk)
        if order.receives(k, backward=True):
            signals.append(stage.receive_backward())
        yield from signals
    yield from sent_back
    yield from stage.exchange()


def _oldest(waiting: deque[Signal]) -> Iterator[Signal]:
    """The receive that was posted first, if any is under way."""
    if waiting:
        yield waiting.popleft()
