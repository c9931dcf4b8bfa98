# SPDX-License-Identifier: Apache-2.0
"""Messages between two processes over an emulated link, as gloo sends them over a real one.

gloo sends a message when it has been handed over and its receiver has said that it waits for it:

    sender      hand-over ─────────────── starts ▒▒▒▒▒▒▒▒▒ last byte leaves
    receiver              waits ─ ready ─┘           ▒▒▒▒▒▒▒▒▒ last byte arrives
                                latency       latency

What is ready is said on the same connection, so behind the messages that are on their way there.
A send is over when its last byte has left, a receive when it has arrived.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mapl.link import DelayedSender, Delivery, EmulatedLink, LinkClock, sleep_until

#: Bytes that any real connection passes in a fraction of a millisecond.
_SMALL = 128 * 1024
#: Of a receiver's word that it is ready, with the headers of gloo and TCP, roughly.
_WORD_BYTES = 64
_MESSAGE, _WORD = 0, 1  # tags
_READY, _END = 0, 1  # words
#: A receiver may take its time, for an evaluation, say; who waits for a send has a timeout.
_FOREVER = timedelta(days=365)


class EmulatedConnection:
    """What this process exchanges with one process of a neighbouring stage.

    A thread hears the peer's words. The n-th word that it is ready starts the n-th message.
    """

    def __init__(
        self,
        name: str,
        link: EmulatedLink,
        clock: LinkClock,
        groups: tuple[Any, Any],
        timeout: timedelta,
    ) -> None:
        """
        Args:
            name: of the link, for messages.
            link: to the neighbour.
            clock: the link's, to be closed with the connection.
            groups: process groups of all processes, for what goes to lower and to higher ranks.
                Each has connections of its own: two messages that crossed on one connection of gloo
                were measured to arrive 4 ms late.
            timeout: how long a message may wait for its receiver.
        """
        self._timeout = timeout
        self._link, self._clock, self._groups = link, clock, groups
        self._sender = DelayedSender(name)
        self._lock = threading.Lock()
        self._waiting: deque[Sending] = deque()  # for a word that the peer is ready
        self._ready_at: deque[float] = deque()  # words that wait for a message
        self._hearing: threading.Thread | None = None  # since the first message
        self._received_from: int | None = None

    def send(self, tensor: torch.Tensor, peer: int) -> "Sending":
        """Starts to send a contiguous tensor to global rank `peer`, which may change afterwards.

        Raises:
            RuntimeError: an earlier send failed.
            ValueError: the tensor is not on the CPU.
        """
        handed_over_at = time.monotonic()  # before the copy, which a real link would not make
        # A copy, since the last byte leaves, and `wait()` returns, before the real transfer starts.
        data = _bytes_of(tensor).clone()
        sending = Sending(self._sender, data, peer, handed_over_at, self._timeout)
        if self._hearing is None:
            self._hearing = threading.Thread(target=self._hear, args=(peer,), daemon=True)
            self._hearing.start()
        with self._lock:
            self._sender.raise_if_failed()
            self._waiting.append(sending)
            self._start_what_can()
        return sending

    def receive(self, tensor: torch.Tensor, peer: int) -> "Receiving":
        """Starts to receive from global rank `peer` into a contiguous tensor.

        Raises:
            RuntimeError: an earlier send failed.
            ValueError: the tensor is not on the CPU.
        """
        receiving = Receiving(_bytes_of(tensor), peer, self._from(peer))
        self._received_from = peer
        delay = self._link.seconds(_WORD_BYTES) + self._link.latency
        self._say(_READY, peer, time.monotonic() + delay)
        return receiving

    def end(self) -> None:
        """Tells the peer that this process receives nothing more; `close` waits for its word.

        Raises:
            RuntimeError: an earlier send failed.
        """
        if self._received_from is not None:
            self._say(_END, self._received_from, time.monotonic())

    def close(self) -> None:
        """Waits until all is sent; to be called after `end` on all connections of this process.

        Raises:
            RuntimeError: a send failed, or the peer does not end.
        """
        try:
            if self._hearing is not None:
                self._hearing.join(self._timeout.total_seconds())
                if self._hearing.is_alive():
                    self._sender.fail(TimeoutError("timed out: the peer does not end"))
                    self._sender.raise_if_failed()
            self._sender.close()
        finally:
            self._clock.close()

    def _to(self, peer: int) -> Any:
        return self._groups[dist.get_rank() < peer]

    def _from(self, peer: int) -> Any:
        return self._groups[peer < dist.get_rank()]

    def _say(self, word: int, peer: int, when: float) -> None:
        data = torch.full((_WORD_BYTES,), word, dtype=torch.uint8)
        say: Any = partial(dist.isend, data, peer, self._to(peer), _WORD)
        self._sender.submit(when, say)

    def _hear(self, peer: int) -> None:
        """Runs in a thread until the peer closes its side, or a transfer fails."""
        word = torch.empty(_WORD_BYTES, dtype=torch.uint8)
        try:
            while True:
                work: Any = dist.irecv(word, peer, self._from(peer), _WORD)
                work.wait(_FOREVER)
                with self._lock:
                    if word[0] == _END:
                        break
                    self._ready_at.append(time.monotonic())
                    self._start_what_can()
            if self._waiting:
                raise ConnectionError(f"rank {peer} ended before it had received everything")
        except Exception as error:  # raised where a message is waited for
            self._sender.fail(error)
            with self._lock:
                for sending in self._waiting:
                    sending.settled.set()

    def _start_what_can(self) -> None:
        """With the lock: schedules the messages whose receiver is ready, at once if it has been."""
        while self._waiting and self._ready_at:
            sending = self._waiting[0]
            start = max(self._ready_at.popleft(), sending.handed_over_at)
            data, peer = sending.data, sending.peer
            leaves_at, arrives_at = self._link.schedule(len(data), start)
            for begin, end in _pieces(len(data)):
                due = arrives_at - self._link.seconds(len(data) - end)
                send: Any = partial(dist.isend, data[begin:end], peer, self._to(peer), _MESSAGE)
                sending.scheduled(leaves_at, self._sender.submit(due, send))
            sending.settled.set()
            self._waiting.popleft()


class Sending:
    """A send under way, in place of a `torch.distributed.Work`."""

    def __init__(
        self,
        sender: DelayedSender,
        data: torch.Tensor,
        peer: int,
        handed_over_at: float,
        timeout: timedelta,
    ) -> None:
        self.data, self.peer, self._timeout = data, peer, timeout
        self.handed_over_at = handed_over_at
        self.settled = threading.Event()
        self._sender = sender
        self._leaves_at = 0.0
        self._last: Delivery | None = None

    def scheduled(self, leaves_at: float, last: Delivery) -> None:
        """Books when the last byte leaves, and the last delivery so far."""
        self._leaves_at, self._last = leaves_at, last

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As torch's.

        Raises:
            RuntimeError: the receiver was not ready in time, or this or an earlier send failed.
        """
        seconds = (timeout or self._timeout).total_seconds()
        if not self.settled.wait(seconds):
            raise RuntimeError(f"timed out after {seconds:g} s: rank {self.peer} does not receive")
        self._sender.raise_if_failed()
        sleep_until(self._leaves_at)
        if self._last is not None and self._last.due <= self._leaves_at:
            self._sender.wait_for_start(self._last)
        self._sender.raise_if_failed()
        return True


class Receiving:
    """A receive under way: posted at once, in the pieces in which it is sent."""

    def __init__(self, data: torch.Tensor, peer: int, group: Any) -> None:
        self._works: list[Any] = [
            dist.irecv(data[begin:end], peer, group, _MESSAGE) for begin, end in _pieces(len(data))
        ]

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As torch's; `timeout`, if any, counts for each piece."""
        while self._works:
            work = self._works.pop(0)
            work.wait() if timeout is None else work.wait(timeout)
        return True


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """How `size` bytes are cut: begin and end of each piece, by one rule for both sides.

    If all of a message began its way over the real connection when its last byte is due, it would
    arrive too late by the time of that way. So its first half goes when the last byte of that half
    is due, then half of the rest, and so on, until what is left takes no time worth mentioning.
    """
    begin = 0
    while size - begin > _SMALL:
        end = begin + (size - begin) // 2
        yield begin, end
        begin = end
    yield begin, size


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, [n] uint8, in its memory."""
    if not tensor.is_cpu:
        raise ValueError(f"an emulated link carries tensors on the CPU, not on {tensor.device}")
    return tensor.detach().view(-1).view(torch.uint8)
