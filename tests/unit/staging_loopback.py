# SPDX-License-Identifier: Apache-2.0
"""A transport to oneself, for tests of staging on any device."""

import threading
from collections.abc import Sequence
from datetime import timedelta
from queue import Queue
from typing import Any

import torch

from megatron.mapl.transport import OPPOSITE, Operation


class Loopback:
    """What is sent to the next stage comes from the previous one; host memory alone.

    As gloo, it reads what is sent, and writes what is received, at any time until `wait()` returns.
    """

    def __init__(self) -> None:
        self.queues: dict[str, Queue[torch.Tensor]] = {"next": Queue(), "prev": Queue()}
        self.threads: list[str] = []
        self.failure: Exception | None = None
        self.may_send = threading.Event()
        self.may_send.set()

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        return [self._transfer(op) for op in operations]

    def _transfer(self, op: Operation) -> Any:
        assert op.tensor.is_cpu
        self.threads.append(threading.current_thread().name)
        if op.kind == "send":
            assert self.may_send.wait(20)
        if self.failure is not None and op.kind == "send":
            raise self.failure
        if op.kind == "send":
            self.queues[op.direction].put(op.tensor)
            return Work(None, op.tensor)
        return Work(self.queues[OPPOSITE[op.direction]], op.tensor)


class Work:
    """Ends, for a receive, when something was sent."""

    def __init__(self, queue: "Queue[torch.Tensor] | None", tensor: torch.Tensor) -> None:
        self._queue, self._tensor = queue, tensor

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._queue is not None:
            self._tensor.copy_(self._queue.get())
        return True


def send(direction: str, tensor: torch.Tensor) -> Operation:
    return Operation("send", tensor, direction, 0, None)  # type: ignore[arg-type]


def receive(direction: str, tensor: torch.Tensor) -> Operation:
    return Operation("recv", tensor, direction, 0, None)  # type: ignore[arg-type]
