# SPDX-License-Identifier: Apache-2.0
"""What a process does in one step with virtual stages: Megatron's interleaved 1F1B schedule.

Megatron overlaps transfers between its warm-up and its cool-down, but waits for what it sends
forward, since it frees that memory.
"""

from collections import deque
from collections.abc import Iterator

from event_messages import Process, Signal
from pipeline_stage import Stage


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
