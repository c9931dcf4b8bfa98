# SPDX-License-Identifier: Apache-2.0
"""Payloads under way: started, kept alive, waited for, and what is said when a peer is gone.

Megatron's schedule without virtual stages waits for each send and each receive where it stands. But
a send needs nobody's time once its payload is packed, and the size of what will arrive is known
long before. `InFlight` keeps up to `depth` payloads a direction under way while the stage computes:

1. a receive is posted as soon as there is room, not when its micro-batch is due;
2. a send is waited for when `depth` later ones have been started, or at the end of the schedule.

Micro-batches are computed in the same order on the same numbers, so the losses stay the same.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch

#: What gloo and NCCL say when a peer has ended …
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "Connection refused")
#: … and when it has not answered in time.
_SILENT = ("Timed out", "timed out", "timeout", "Timeout")


class PeerError(RuntimeError):
    """Another process of the job has ended, or does not answer."""


def lost_peer(error: BaseException) -> str | None:
    """What the error of a collective or a transfer says about a peer; None for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(sign in text for sign in _GONE):
        return f"another process is gone ({_first_line(text)})"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _SILENT):
        return f"another process does not answer within the time-out ({_first_line(text)})"
    return None


def _first_line(text: str) -> str:
    """The reason without the place in gloo's source before it and the stack after it."""
    return re.sub(r"^(\[[^]]*\] *)+", "", text.splitlines()[0])


def wait(work: Any, what: str, timeout: timedelta | None = None) -> None:
    """Waits for a transfer.

    Args:
        work: what the transfer's start returned.
        what: was waited for, to be said in an error.
        timeout: None for that of the process group.

    Raises:
        PeerError: the peer is gone or silent.
    """
    try:
        if timeout is None:
            work.wait()
        else:
            work.wait(timeout)
    except RuntimeError as error:
        lost = lost_peer(error)
        if lost is None:
            raise
        raise PeerError(f"{what}: {lost}") from error


def leave_together() -> None:
    """Ends the process group in step: gloo aborts the peers of a process that leaves early."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class InFlight:
    """The transfers of one call of Megatron's schedule without virtual stages.

    Args:
        depth: how many payloads a direction may be under way.
        micro_batches: of the call.
        forward_only: whether it is an evaluation, to which no gradients come back.
        timeout: of a transfer; None for that of the process group.
    """

    def __init__(
        self,
        depth: int,
        micro_batches: int,
        *,
        forward_only: bool,
        timeout: timedelta | None = None,
    ) -> None:
        self._depth, self._timeout = depth, timeout
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
        wait(work, what, self._timeout)
        return buffer

    def send(self, side: str, work: Any, payload: torch.Tensor, what: str) -> None:
        """Keeps a send to `side` that was started.

        Raises:
            PeerError: the peer is gone; shows in an earlier send.
        """
        self._sending[side].append((work, payload))
        while len(self._sending[side]) > self._depth:
            wait(self._sending[side].popleft()[0], what, self._timeout)

    def drain(self) -> None:
        """Waits for the sends that are left.

        Raises:
            PeerError: the peer is gone.
        """
        for side, sending in self._sending.items():
            while sending:
                what = f"the last sends to the {_STAGE[side]} stage"
                wait(sending.popleft()[0], what, self._timeout)


_STAGE = {"prev": "previous", "next": "next"}


def wait_all(works: Iterable[Any], what: str, timeout: timedelta | None = None) -> None:
    """Waits for all of them, each as `wait` does.

    Raises:
        PeerError: a peer is gone.
    """
    for work in works:
        wait(work, what, timeout)
