# SPDX-License-Identifier: Apache-2.0
"""Staged transfers, of tensors on the CPU: order, lifetimes, errors. On a GPU: tests/gpu."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from megatron.mapl import staging
from megatron.mapl.staging import StagedTransport
from megatron.mapl.transfers import PeerError, lost_peer, wait
from staging_loopback import Loopback, receive, send


@pytest.fixture
def loopback() -> Loopback:
    return Loopback()


@pytest.fixture
def staged(loopback: Loopback) -> Iterator[StagedTransport]:
    transport = StagedTransport(loopback, timedelta(seconds=20))
    yield transport
    transport.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_messages_keep_their_order(staged: StagedTransport, dtype: torch.dtype) -> None:
    shapes = [(3,), (2, 5, 7), (1,), (1000,)] * 5
    sent = [torch.full(shape, number).to(dtype) for number, shape in enumerate(shapes)]
    received = [torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
                for shape in shapes]  # fmt: skip
    receives = staged.transfer([receive("prev", tensor) for tensor in received])
    sends = staged.transfer([send("next", tensor) for tensor in sent])
    for work in sends + receives:
        assert work.wait() and work.wait()
    assert all(torch.equal(*pair) for pair in zip(received, sent, strict=True))
    assert all(tensor.grad_fn is None for tensor in received)


def test_directions_do_not_wait_for_each_other(staged: StagedTransport) -> None:
    """In a pipeline of two stages either may be ahead."""
    first, second = torch.zeros(4), torch.zeros(4)
    late, early = staged.transfer([receive("prev", first), receive("next", second)])
    staged.transfer([send("prev", torch.full((4,), 2.0))])
    early.wait()
    assert second.eq(2).all() and first.eq(0).all()
    staged.transfer([send("next", torch.ones(4))])
    late.wait()
    assert first.eq(1).all()


def test_what_is_sent_may_change_at_once(staged: StagedTransport) -> None:
    tensor, into = torch.ones(5), torch.zeros(5)
    (work,) = staged.transfer([send("next", tensor)])
    tensor.zero_()
    work.wait()
    staged.transfer([receive("prev", into)])[0].wait()
    assert into.eq(1).all()


def test_sends_start_in_a_thread_and_receives_at_once(
    staged: StagedTransport, loopback: Loopback
) -> None:
    into = torch.zeros(1)
    work = staged.transfer([receive("prev", into)])[0]
    assert loopback.threads == ["MainThread"]
    staged.transfer([send("next", torch.ones(1))])
    work.wait()
    assert loopback.threads == ["MainThread", "staged sends"]


def test_each_thread_goes_to_the_device_of_its_messages(
    staged: StagedTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []
    monkeypatch.setattr(
        staging._Copies, "enter", lambda self: entered.append(threading.current_thread().name)
    )
    for _ in range(3):
        operations = [receive("prev", torch.zeros(2)), send("next", torch.ones(2))]
        for work in staged.transfer(operations):
            work.wait()
    assert sorted(entered) == ["staged recv prev", "staged send next", "staged sends"]

    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    staging._DeviceCopies(torch.device("cuda:3")).enter()
    assert devices == [torch.device("cuda:3")]


def test_nothing_is_kept_once_it_is_over(staged: StagedTransport) -> None:
    tensor, into = torch.ones(1000), torch.zeros(1000)
    alive = [x.untyped_storage()._weak_ref() for x in (tensor, into)]
    for work in staged.transfer([send("next", tensor), receive("prev", into)]):
        work.wait()
    del tensor, into, work
    deadline = time.monotonic() + 10
    while not all(torch.UntypedStorage._expired(ref) for ref in alive):
        assert time.monotonic() < deadline, "a thread keeps what it has handled"
        time.sleep(0.01)
    for ref in alive:
        torch.UntypedStorage._free_weak_ref(ref)


def test_what_is_sent_may_be_freed_at_once(staged: StagedTransport, loopback: Loopback) -> None:
    """Megatron frees a stage's output when its send has been started."""
    loopback.may_send.clear()
    tensor, into = torch.ones(1000), torch.zeros(1000)
    alive = tensor.untyped_storage()._weak_ref()
    sending, receiving = staged.transfer([send("next", tensor), receive("prev", into)])
    tensor.data = torch.empty(1)
    assert torch.UntypedStorage._expired(alive)
    torch.UntypedStorage._free_weak_ref(alive)
    loopback.may_send.set()
    sending.wait()
    receiving.wait()
    assert into.eq(1).all()


def test_a_failure_fails_what_comes_later_too(staged: StagedTransport, loopback: Loopback) -> None:
    loopback.failure = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    works = staged.transfer([send("next", torch.ones(1)), send("next", torch.ones(1))])
    for work in works:
        with pytest.raises(PeerError, match="a payload: another process is gone"):
            wait(work, "a payload")
    loopback.failure = None
    with pytest.raises(RuntimeError, match="closed by peer"):
        staged.transfer([send("next", torch.ones(1))])[0].wait()
    with pytest.raises(RuntimeError, match="closed by peer"):
        staged.close()


def test_a_failure_that_nobody_waited_for_shows_at_the_end(
    staged: StagedTransport, loopback: Loopback
) -> None:
    loopback.failure = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    staged.transfer([send("next", torch.ones(1))])
    with pytest.raises(RuntimeError, match="closed by peer") as raised:
        staged.close()
    assert raised.value.__cause__ is loopback.failure
    staged.close()


def test_the_end_waits_for_what_is_under_way(staged: StagedTransport, loopback: Loopback) -> None:
    loopback.may_send.clear()
    into = torch.zeros(1)
    staged.transfer([receive("prev", into), send("next", torch.ones(1))])
    threading.Timer(0.05, loopback.may_send.set).start()
    staged.close()
    assert into.eq(1).all()


@pytest.mark.parametrize("kind", ["send", "recv"])
def test_what_never_ends_is_named(loopback: Loopback, kind: str) -> None:
    staged = StagedTransport(loopback, timedelta(seconds=0.05))
    if kind == "send":
        loopback.may_send.clear()
        staged.transfer([send("next", torch.ones(1))])
        late = "staged sends"
    else:
        staged.transfer([receive(side, torch.zeros(1)) for side in ("prev", "next")])
        late = "staged recv prev, staged recv next"
    with pytest.raises(RuntimeError, match=rf"^timed out after 0.05 s: {late} did not end$") as end:
        staged.close()
    assert lost_peer(end.value) is not None
    loopback.may_send.set()  # so that the threads end
    for side in ("prev", "next"):
        loopback.queues[side].put(torch.ones(1))


def test_nothing_is_transferred_after_the_end(staged: StagedTransport, loopback: Loopback) -> None:
    staged.transfer([send("next", torch.ones(1))])[0].wait()
    staged.close()
    for late in (send("next", torch.ones(1)), receive("prev", torch.zeros(1))):
        with pytest.raises(RuntimeError, match="closed: nothing is sent"):
            staged.transfer([late])
    assert len(loopback.threads) == 1


def test_a_silent_peer(staged: StagedTransport) -> None:
    into = torch.zeros(1)
    (work,) = staged.transfer([receive("prev", into)])
    with pytest.raises(PeerError, match=r"does not answer .*rank 0 does not send"):
        wait(work, "a payload", timedelta(seconds=0.05))
    staged.transfer([send("next", torch.ones(1))])  # so that the thread ends


@pytest.mark.parametrize(
    ("backend", "cpu_mode", "expected"),
    [("gloo", False, True), ("gloo", True, False), ("nccl", False, False)],
)
def test_when_it_is_needed(backend: str, cpu_mode: bool, expected: bool) -> None:
    assert staging.needed(backend, cpu_mode=cpu_mode) is expected
