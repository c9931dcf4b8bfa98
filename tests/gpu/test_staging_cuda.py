# SPDX-License-Identifier: Apache-2.0
"""Staged transfers of tensors on a GPU: right bytes under pressure, and no wait of the host."""

import sys
from collections import deque
from datetime import timedelta
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from megatron.mapl.staging import StagedTransport
from staging_loopback import Loopback, receive, send

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: About a millisecond of waiting on the device.
CYCLES = 1_500_000


def busy() -> None:
    """Keeps the current stream busy, so that the host is ahead of it."""
    torch.cuda._sleep(CYCLES)


def test_bytes_are_right_while_memory_is_used_again() -> None:
    """The sender frees at once what it sends, the receiver takes memory that was freed just now."""
    staged = StagedTransport(Loopback(), timedelta(seconds=60))
    shape, ahead, due = (257, 1023), 3, 0
    waiting: deque[tuple[torch.Tensor, object]] = deque()
    sends, wrong = [], torch.zeros((), dtype=torch.long, device="cuda")
    for number in range(200):
        if number % 7 == 0:
            busy()
        tensor = torch.full(shape, number, dtype=torch.int32, device="cuda")
        sends += staged.transfer([send("next", tensor)])
        del tensor
        torch.full(shape, -1, dtype=torch.int32, device="cuda")  # in its memory, if it is free
        into = torch.empty(shape, dtype=torch.int32, device="cuda")
        waiting.append((into, staged.transfer([receive("prev", into)])[0]))
        del into
        while len(waiting) > ahead or (number == 199 and waiting):
            received, work = waiting.popleft()
            work.wait()  # type: ignore[attr-defined]
            wrong += (received != due).sum()
            due += 1
            received.fill_(-2)
            del received
    for work in sends:
        work.wait()
    assert due == 200 and wrong.item() == 0
    staged.close()


def test_the_host_waits_for_no_copy() -> None:
    """The receive is over before the device has even computed what follows it."""
    staged = StagedTransport(Loopback(), timedelta(seconds=60))
    tensor, into = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    for _ in range(2):  # pinned memory is allocated the first time
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            works = staged.transfer([receive("prev", into), send("next", tensor)])
            busy()
            for work in works:
                work.wait()
            total = into.sum()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert total.item() == 1 << 20
    staged.close()


def test_another_stream_may_be_current() -> None:
    staged = StagedTransport(Loopback(), timedelta(seconds=60))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        tensor = torch.full((1 << 16,), 5.0, device="cuda")
        into = torch.empty(1 << 16, device="cuda")
        for work in staged.transfer([send("prev", tensor), receive("next", into)]):
            work.wait()
        total = into.sum()
    stream.synchronize()
    assert total.item() == 5 * (1 << 16)
    staged.close()
