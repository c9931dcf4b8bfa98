# SPDX-License-Identifier: Apache-2.0
"""Processes that compute and exchange messages over links, in simulated time.

A process is a generator. It yields a number of seconds to compute for, or a `Signal` to wait for,
and posts sends and receives in between. The k-th send on a channel meets the k-th receive on it.
A message starts when its send has been posted and the sender knows that the receiver waits:

    starts   s = max(send posted, word that the receiver waits, way free)
    leaves   e = s + bytes · seconds_a_byte,   and the way is free again
    arrives  e + latency

That word takes the way back: with gloo on the same connection, so behind the messages that are on
their way there, as measured with `tools/bench_slow_network.py`; with NCCL past them. A send is over
when its message has left, a receive when it has arrived. Several channels may share one way, which
serves one message after the other. Computation is shared evenly: with more busy
processes than devices, each runs at devices / busy of its speed.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

from event_messages import WORD_BYTES, Message, Process, Signal, Way


class Simulation:
    """The clock, the devices and the messages under way.

    Attributes:
        now: seconds since the start.
    """

    def __init__(
        self, ways: Mapping[Hashable, tuple[Way, Way]], devices: float, *, words_queue: bool
    ) -> None:
        """
        Args:
            ways: channel → the way that its messages take, and the way back.
            devices: how many processes compute at full speed at once.
            words_queue: whether a receiver's word waits behind the messages on the way back.
        """
        self.now = 0.0
        self._ways, self._devices, self._words_queue = ways, devices, words_queue
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        # Work that a process would have done that computes all along; a computation ends at one
        # amount of it, whatever the others do meanwhile.
        self._work = 0.0
        self._computing: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._sends: dict[Hashable, deque[Message]] = defaultdict(deque)
        self._receives: dict[Hashable, deque[Message]] = defaultdict(deque)

    def send(self, channel: Hashable, size: float) -> Signal:
        """Posts a message of `size` bytes; the signal happens when it has left."""
        message = _first_or_new(self._receives[channel], self._sends[channel])
        message.size, message.sent = size, True
        self._start_if_due(channel, message)
        return message.left

    def receive(self, channel: Hashable) -> Signal:
        """Posts a receive; the signal happens when its message has arrived."""
        message = _first_or_new(self._sends[channel], self._receives[channel])

        def hear() -> None:
            message.asked_for = True
            self._start_if_due(channel, message)

        _, back = self._ways[channel]
        if self._words_queue:
            word = Message(WORD_BYTES)
            word.arrived.waiting.append(hear)
            self._enter(back, word)
        else:
            self._at(self.now + back.latency, hear)
        return message.arrived

    def run(self, processes: Sequence[Process]) -> list[float]:
        """Runs all to their ends.

        Returns:
            When each ended.

        Raises:
            RuntimeError: some wait for what never happens.
        """
        ends: dict[int, float] = {}
        for index, process in enumerate(processes):
            self._resume(process, index, ends)
        while self._timers or self._computing:
            rate = min(1.0, self._devices / max(1, len(self._computing)))
            done = float("inf")
            if self._computing:
                done = self.now + (self._computing[0][0] - self._work) / rate
            if self._timers and self._timers[0][0] <= done:
                when, _, call = heapq.heappop(self._timers)
                self._work += (when - self.now) * rate
            else:
                when = done
                self._work, _, call = heapq.heappop(self._computing)
            self.now = when
            call()
        if len(ends) < len(processes):
            stuck = [index for index in range(len(processes)) if index not in ends]
            raise RuntimeError(f"simulated processes {stuck} wait for messages that nobody sends")
        return [ends[index] for index in range(len(processes))]

    def _resume(self, process: Process, index: int, ends: dict[int, float]) -> None:
        """Runs a process until it computes, or waits for what has not happened, or ends."""

        def again() -> None:
            self._resume(process, index, ends)

        for what in process:
            if isinstance(what, Signal):
                if not what.happened:
                    what.waiting.append(again)
                    return
            elif what > 0:
                self._number += 1
                heapq.heappush(self._computing, (self._work + what, self._number, again))
                return
        ends[index] = self.now

    def _start_if_due(self, channel: Hashable, message: Message) -> None:
        if message.sent and message.asked_for:
            self._enter(self._ways[channel][0], message)

    def _enter(self, way: Way, message: Message) -> None:
        """A message comes to its way."""
        if way.occupied:
            way.queue.append(message)
            return
        duration = message.size * way.seconds_a_byte
        way.occupied = True
        way.busy += duration
        self._at(self.now + duration, lambda: self._leave(way, message))

    def _leave(self, way: Way, message: Message) -> None:
        way.occupied = False
        if way.queue:
            self._enter(way, way.queue.popleft())
        self._at(self.now + way.latency, lambda: self._happen(message.arrived))
        self._happen(message.left)

    def _happen(self, signal: Signal) -> None:
        signal.happened = True
        for call in signal.waiting:
            call()

    def _at(self, when: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, call))


def _first_or_new(others: deque[Message], own: deque[Message]) -> Message:
    """The message that the other side has posted first, or a new one that waits for it."""
    if others:
        return others.popleft()
    message = Message()
    own.append(message)
    return message
