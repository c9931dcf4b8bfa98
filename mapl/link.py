# SPDX-License-Identifier: Apache-2.0
"""A slow network link, emulated in time: who may send when, and a thread that sends then.

One direction of a link is a server that passes one message after the other. A message of n bytes
that is handed over at time t

    starts at   s = max(t, free)
    leaves at   e = s + 8 n / bandwidth,   and free ← e
    arrives at  e + latency

so bandwidth is shared by all who send, and latency is not. Times are seconds of `time.monotonic`,
which is one clock for all processes of a host. Messages are served whole, in the order of their
reservations; a real network would mix their packets, which moves no message but the overtaken.
"""

import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

_FREE = struct.Struct("d")


class LinkClock:
    """When one direction of one link will be free again, known to all who share the link.

    The time lies in a file of eight bytes, which all processes map and lock. Once all have opened
    it, it can be deleted. A process that dies while it holds the lock gives it back.
    """

    def __init__(self, path: str | None = None) -> None:
        """
        Args:
            path: what `create_file` returned, in one of the processes; None for a clock that only
                this object's users share.

        Raises:
            OSError: the file cannot be opened.
        """
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(-1 if self._file is None else self._file, _FREE.size)
        self._threads = threading.Lock()

    @staticmethod
    def create_file() -> str:
        """Makes the file of a link that is free, among the temporary ones; returns its path."""
        file, path = tempfile.mkstemp(prefix="mapl-link-")
        try:
            os.write(file, _FREE.pack(0.0))
        finally:
            os.close(file)
        return path

    def reserve(self, duration: float, now: float) -> tuple[float, float]:
        """Takes the link for `duration` seconds, from `now` or from when it is free.

        Returns:
            Start and end of what was taken.
        """
        with self._threads:
            # Locks the open file, so it also holds between two clocks of one process.
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                start = max(now, _FREE.unpack_from(self._memory)[0])
                _FREE.pack_into(self._memory, 0, start + duration)
            finally:
                if self._file is not None:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        return start, start + duration

    def close(self) -> None:
        """Gives the file back; a second call does nothing."""
        self._memory.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


class EmulatedLink:
    """One direction of one link, as one of its senders sees it.

    Attributes:
        latency: seconds, one way.
    """

    def __init__(
        self,
        bandwidth_mbit: float | None,
        latency_ms: float,
        clock: LinkClock,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            bandwidth_mbit: 10⁶ bits a second; None for no limit.
            latency_ms: milliseconds, one way.
            clock: shared by all who send over this link in this direction.
            now: tells the time, in seconds.

        Raises:
            ValueError: the bandwidth is not positive and finite, or the latency not finite or
                negative.
        """
        if bandwidth_mbit is not None and not 0 < bandwidth_mbit < float("inf"):
            raise ValueError(
                f"the bandwidth of a link must be positive, got {bandwidth_mbit} Mbit/s"
            )
        if not 0 <= latency_ms < float("inf"):
            raise ValueError(f"the latency of a link must be 0 or more, got {latency_ms} ms")
        self._seconds_a_byte = 0.0 if bandwidth_mbit is None else 8e-6 / bandwidth_mbit
        self.latency = latency_ms / 1e3
        self._clock = clock
        self._now = now

    def seconds(self, nbytes: int) -> float:
        """How long the link takes to pass `nbytes`: 8 n / bandwidth."""
        return nbytes * self._seconds_a_byte

    def schedule(self, nbytes: int, when: float | None = None) -> tuple[float, float]:
        """Reserves the link for a message of `nbytes` that may start at `when`, by default now.

        Returns:
            (leaves_at, arrives_at): when its last byte leaves, and when it arrives, in seconds.
        """
        _, leaves_at = self._clock.reserve(
            self.seconds(nbytes), self._now() if when is None else when
        )
        return leaves_at, leaves_at + self.latency


def sleep_until(when: float) -> None:
    """Returns at `when` (seconds of `time.monotonic`) or just after it, never before."""
    while (left := when - time.monotonic()) > 0:
        time.sleep(left)


class Waitable(Protocol):
    """A transfer under way, such as a `torch.distributed.Work`."""

    def wait(self) -> object:
        """Returns when the transfer is done; raises what went wrong."""


@dataclass
class Delivery:
    """One callable that a `DelayedSender` was given, and when it is due."""

    due: float
    start: Callable[[], Waitable]
    settled: threading.Event = field(default_factory=threading.Event)


class DelayedSender:
    """Starts transfers at given times, in the order of their submission, while others compute.

    One daemon thread sleeps until a transfer is due and starts it; a second one waits for the
    transfers that were started, since a slow receiver must not hold up the next start, and keeps
    what they send alive until they are done. After the first failure nothing more is started, and
    every later call raises it: what has not been sent yet would arrive out of order.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the link, for messages and for the threads' names.
        """
        self._name = name
        self._failure: Exception | None = None
        self._due: SimpleQueue[Delivery | None] = SimpleQueue()
        self._under_way: SimpleQueue[tuple[Delivery, Waitable] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target in (self._start_when_due, self._wait_until_done)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, when: float, start: Callable[[], Waitable]) -> Delivery:
        """Has `start()` called at `when`, or after the submissions before it if that is later.

        Args:
            when: seconds of `time.monotonic`.
            start: starts a transfer and returns it; called in another thread.

        Raises:
            RuntimeError: something that was submitted before has failed.
        """
        self.raise_if_failed()
        delivery = Delivery(when, start)
        self._due.put(delivery)
        return delivery

    def wait_for_start(self, delivery: Delivery) -> None:
        """Returns once the delivery's transfer has been started.

        Raises:
            RuntimeError: it, or something that was submitted before, has failed.
        """
        delivery.settled.wait()
        self.raise_if_failed()

    def fail(self, error: Exception) -> None:
        """Has every later call raise `error`, unless something has failed before."""
        self._failure = self._failure or error

    @property
    def failed(self) -> bool:
        """Whether anything has failed."""
        return self._failure is not None

    def raise_if_failed(self) -> None:
        """
        Raises:
            RuntimeError: something that was submitted has failed; its cause is the first failure.
        """
        if self._failure is not None:
            raise RuntimeError(f"{self._name}: sending failed: {self._failure}") from self._failure

    def close(self) -> None:
        """Waits until all that was submitted is done, and ends the threads.

        Raises:
            RuntimeError: something that was submitted has failed.
        """
        starting, waiting = self._threads
        self._due.put(None)
        starting.join()
        self._under_way.put(None)
        waiting.join()
        self.raise_if_failed()

    def _start_when_due(self) -> None:
        while (delivery := self._due.get()) is not None:
            if self._failure is None:
                sleep_until(delivery.due)
                try:
                    self._under_way.put((delivery, delivery.start()))
                except Exception as error:
                    self.fail(error)
            delivery.settled.set()

    def _wait_until_done(self) -> None:
        while (transfer := self._under_way.get()) is not None:
            try:
                transfer[1].wait()
            except Exception as error:
                self.fail(error)
