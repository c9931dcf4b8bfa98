# SPDX-License-Identifier: Apache-2.0
"""What two ranks do to measure the link between them, with `torch.distributed` as stages use it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_PINGS = 30
_ROUNDS = 3
#: Bytes of the first stream, from which it grows to take its time, and of one of its messages.
_FIRST, _MESSAGE = 64 << 10, 8 << 20


class Pair:
    """One end; both call the same methods at the same time.

    Args:
        peer: global rank of the other.
        first: whether this one begins.
        seconds: that a stream is to take.
    """

    def __init__(self, peer: int, *, first: bool, seconds: float, device: torch.device) -> None:
        self._peer, self._first, self._seconds, self._device = peer, first, seconds, device
        self._latency = 0.0

    def latency(self) -> float:
        """Seconds one way: half of what 8 bytes take there and back, the median of many tries."""
        word = torch.zeros(8, dtype=torch.uint8, device=self._device)
        order = (dist.isend, dist.irecv) if self._first else (dist.irecv, dist.isend)
        tries = []
        for _ in range(_PINGS):
            start = time.perf_counter()
            for operation in order:
                self._wait([(operation, word)])
            tries.append(time.perf_counter() - start)
        self._latency = statistics.median(tries) / 2
        return self._latency

    def incoming(self, *, sends: bool, receives: bool) -> list[float]:
        """Mbit/s of what comes in, of each round; nothing if this end does not receive.

        To be called after `latency`.
        """
        out, into = _FIRST * sends, _FIRST * receives
        while True:
            came = self._stream(out, into)
            went = self._tell(came)
            if self._is_long_enough(came, receives) and self._is_long_enough(went, sends):
                break
            out, into = self._grown(out, went), self._grown(into, came)
        rates = []
        for _ in range(_ROUNDS):
            came = self._stream(out, into)
            if receives:
                # The first byte comes a latency after both have begun, and then all the others.
                rates.append(into * 8 / max(came - self._latency, came / 2) / 1e6)
        return rates

    def _is_long_enough(self, taken: float, in_use: bool) -> bool:
        return not in_use or taken >= self._seconds / 2

    def _grown(self, size: int, taken: float) -> int:
        return int(size * max(1.0, min(4.0, self._seconds / max(taken, 1e-6))))

    def _stream(self, out: int, into: int) -> float:
        """Sends and receives so many bytes at once; seconds until all have come in."""
        memory = torch.zeros(min(max(out, into), _MESSAGE), dtype=torch.uint8, device=self._device)
        outgoing = torch.zeros_like(memory)
        operations = [
            *((dist.irecv, memory[:size]) for size in _messages(into)),
            *((dist.isend, outgoing[:size]) for size in _messages(out)),
        ]
        self._tell(0.0)  # so that both begin together
        start = time.perf_counter()
        return self._wait(operations, receives=len(_messages(into))) - start

    def _tell(self, seconds: float) -> float:
        """What the other end says in exchange."""
        own = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        other = torch.empty_like(own)
        self._wait([(dist.irecv, other), (dist.isend, own)])
        return float(other.item())

    def _wait(
        self, operations: list[tuple[Callable[..., Any], torch.Tensor]], receives: int = 0
    ) -> float:
        """Does all of them at once; when the receives, the first so many, were over."""
        works = dist.batch_isend_irecv(
            [dist.P2POp(operation, tensor, self._peer) for operation, tensor in operations]
        )
        came = None
        for number, work in enumerate(works, start=1):
            work.wait()
            if number == receives:
                came = time.perf_counter()
        if self._device.type == "cuda":  # all are one piece of work
            torch.cuda.synchronize(self._device)
            came = None
        return came or time.perf_counter()


def _messages(size: int) -> list[int]:
    """Bytes of each message of a stream."""
    return [min(_MESSAGE, size - begin) for begin in range(0, size, _MESSAGE)]
