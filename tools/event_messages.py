# SPDX-License-Identifier: Apache-2.0
"""What simulated processes wait for, the messages between them, and the ways that these take."""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field


class Signal:
    """Something that happens once."""

    def __init__(self) -> None:
        self.happened = False
        self.waiting: list[Callable[[], None]] = []


#: Of a receiver's word that it waits, with the headers of gloo and TCP, roughly.
WORD_BYTES = 64

#: What a process yields: seconds to compute, or what it waits for.
Process = Generator[float | Signal, None, None]


@dataclass
class Message:
    """One message: bytes, and whether it was handed over and asked for."""

    size: float = 0.0
    sent: bool = False
    asked_for: bool = False
    left: Signal = field(default_factory=Signal)
    arrived: Signal = field(default_factory=Signal)


@dataclass
class Way:
    """One direction of a link.

    Attributes:
        seconds_a_byte: 8 / (bits a second); 0 for no limit.
        latency: seconds from a byte's leaving to its arrival.
        busy: seconds for which messages have occupied it.
    """

    seconds_a_byte: float
    latency: float
    busy: float = 0.0
    occupied: bool = False
    queue: deque[Message] = field(default_factory=deque)
