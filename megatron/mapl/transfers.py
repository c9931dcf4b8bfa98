# SPDX-License-Identifier: Apache-2.0
"""Payloads under way: started, kept alive, waited for, and what is said when a peer is gone.

Megatron's schedule without virtual stages waits for each send and each receive where it stands. But
a send needs nobody's time once its payload is packed, and the size of what will arrive is known
long before. `InFlight` keeps up to `depth` payloads a direction under way while the stage computes:

1. a receive is posted as soon as there is room, not when its micro-batch is due;
2. a send is waited for when `depth` later ones have been started, or at the end of the schedule.

Micro-batches are computed in the same order on the same numbers, so the losses stay the same.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: What gloo and NCCL say when a peer has ended, or has not answered in time.
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Socket Timeout",
    "Timed out",
    "timed out",
    "Connection refused",
    "Gloo connectFullMesh failed",
)


class PeerError(RuntimeError):
    """Another process of the job has ended, or does not answer."""


def lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective or a transfer says that a peer is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)


def wait(work: Any, what: str) -> None:
    """Waits for a transfer.

    Raises:
        PeerError: the peer is gone; says `what` was waited for.
    """
    try:
        work.wait()
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        reason = str(error).splitlines()[0]
        raise PeerError(f"{what}: the process on the other side is gone ({reason})") from error


class InFlight:
    """The transfers of one call of Megatron's schedule without virtual stages.

    Args:
        depth: how many payloads a direction may be under way.
        micro_batches: of the call.
        forward_only: whether it is an evaluation, to which no gradients come back.
    """

    def __init__(self, depth: int, micro_batches: int, *, forward_only: bool) -> None:
        self._depth = depth
        self._to_come = {"prev": micro_batches, "next": 0 if forward_only else micro_batches}
        self._receiving: dict[str, deque[tuple[Any, torch.Tensor]]] = {
            "prev": deque(),
            "next": deque(),
        }
        self._sending: dict[str, deque[tuple[Any, torch.Tensor]]] = {
            "prev": deque(),
            "next": deque(),
        }

    def post(self, side: str, start: Callable[[], tuple[Any, torch.Tensor]]) -> None:
        """Posts receives from `side` while there is room and something to come.

        Args:
            start: starts one receive; gives its work and its buffer.
        """
        waiting = self._receiving[side]
        while self._to_come[side] and len(waiting) < self._depth:
            self._to_come[side] -= 1
            waiting.append(start())

    def receive(self, side: str, what: str) -> torch.Tensor:
        """The next payload from `side`, once it is there.

        Raises:
            PeerError: the peer is gone.
        """
        assert self._receiving[side], "the schedule receives more than its micro-batches"
        work, buffer = self._receiving[side].popleft()
        wait(work, what)
        return buffer

    def send(self, side: str, work: Any, payload: torch.Tensor, what: str) -> None:
        """Keeps a send to `side` that was started.

        Raises:
            PeerError: the peer is gone; shows in an earlier send.
        """
        self._sending[side].append((work, payload))
        while len(self._sending[side]) > self._depth:
            wait(self._sending[side].popleft()[0], what)

    def drain(self) -> None:
        """Waits for the sends that are left.

        Raises:
            PeerError: the peer is gone.
        """
        for side, sending in self._sending.items():
            while sending:
                wait(sending.popleft()[0], f"the last sends to the {_STAGE[side]} stage")


_STAGE = {"prev": "previous", "next": "next"}


def wait_all(works: Iterable[Any], what: str) -> None:
    """Waits for all of them.

    Raises:
        PeerError: a peer is gone.
    """
    for work in works:
        wait(work, what)
