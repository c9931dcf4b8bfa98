# SPDX-License-Identifier: Apache-2.0
"""Payloads under way: how many, in which order they are waited for, and whose errors are a peer's.

`_Gather` too, which puts together again what several processes have sent a share of.
"""

from datetime import timedelta
from functools import partial

import pytest
import torch

from megatron.mapl import exchange
from megatron.mapl.transfers import InFlight, PeerError, leave_together, lost_peer, wait

TIMEOUT = timedelta(seconds=7)


class Work:
    """A transfer that notes when it is waited for."""

    def __init__(self, name: object, waited: list[object]) -> None:
        self._name, self._waited = name, waited

    def wait(self, timeout: timedelta) -> None:
        assert timeout is TIMEOUT
        self._waited.append(self._name)


def in_flight(depth: int, micro_batches: int, *, forward_only: bool = False) -> InFlight:
    return InFlight(depth, micro_batches, forward_only=forward_only, timeout=TIMEOUT)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_send_is_waited_for_when_as_many_later_ones_are_under_way(depth: int) -> None:
    flight, waited = in_flight(depth, 9), []
    for number in range(5):
        flight.send("next", Work(number, waited), torch.empty(1), "")
        assert waited == list(range(max(0, number + 1 - depth)))
    flight.send("prev", Work("back", waited), torch.empty(1), "")
    assert waited == list(range(5 - depth))  # each side has a queue of its own
    flight.drain()
    assert sorted(map(str, waited)) == ["0", "1", "2", "3", "4", "back"]
    flight.drain()
    assert len(waited) == 6


def test_payloads_are_kept_until_they_are_sent() -> None:
    flight, waited, payload = in_flight(1, 9), [], torch.ones(3)
    alive = [payload.untyped_storage()._weak_ref() for _ in range(1)]
    flight.send("next", Work(0, waited), payload, "")
    del payload
    assert not torch.UntypedStorage._expired(alive[0])
    flight.drain()
    assert torch.UntypedStorage._expired(alive[0])
    torch.UntypedStorage._free_weak_ref(alive[0])


@pytest.mark.parametrize("depth", [1, 2, 3, 100])
def test_receives_are_posted_ahead_up_to_the_depth(depth: int) -> None:
    micro_batches = 5
    flight, waited, posted = in_flight(depth, micro_batches), [], []

    def start() -> tuple[Work, torch.Tensor]:
        posted.append(len(posted))
        return Work(posted[-1], waited), torch.full((1,), float(posted[-1]))

    for number in range(micro_batches):
        flight.post("prev", start)
        flight.post("prev", start)
        assert len(posted) == min(micro_batches, number + depth)
        assert flight.receive("prev", "") == number
        assert waited == list(range(number + 1))
    flight.post("prev", start)
    assert len(posted) == micro_batches


def test_an_evaluation_expects_no_gradients() -> None:
    posted: list[int] = []

    def start() -> tuple[Work, torch.Tensor]:
        posted.append(1)
        return Work(0, []), torch.empty(1)

    in_flight(2, 5, forward_only=True).post("next", start)
    assert not posted
    in_flight(2, 5).post("next", start)
    assert len(posted) == 2


class Failing:
    """A transfer that fails."""

    def __init__(self, text: str) -> None:
        self._text = text

    def wait(self) -> None:
        raise RuntimeError(self._text)


def test_whose_fault_it_is() -> None:
    closed = "[/pytorch/gloo/pair.cc:525] Read error [127.0.0.1]: Connection reset by peer"
    with pytest.raises(PeerError, match=r"^a payload: another process is gone \(Read error"):
        wait(Failing(closed), "a payload")
    with pytest.raises(PeerError, match="does not answer within the time-out"):
        wait(Failing("Timed out waiting 5000ms for recv operation to complete"), "a payload")
    with pytest.raises(RuntimeError, match="out of memory"):
        wait(Failing("out of memory"), "a payload")
    assert lost_peer(ValueError("timeout")) is None


@pytest.mark.parametrize(
    ("initialized", "expected"), [(True, ["barrier", "destroy_process_group"]), (False, [])]
)
def test_processes_leave_together(
    monkeypatch: pytest.MonkeyPatch, initialized: bool, expected: list[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, partial(called.append, name))
    leave_together()
    assert called == expected


class Group:
    """What a process group of these shares would gather."""

    def __init__(self, pieces: list[torch.Tensor]) -> None:
        self.pieces = pieces

    def size(self) -> int:
        return len(self.pieces)


@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_shares_come_together_in_the_order_in_which_they_are_numbered(
    monkeypatch: pytest.MonkeyPatch, tensor_parallel: int, replicas: int
) -> None:
    """A share has the number replica · TP + TP rank, see `model._place`."""

    def all_gather(pieces: list[torch.Tensor], share: torch.Tensor, group: Group) -> None:
        assert any(torch.equal(share, piece) for piece in group.pieces)
        for piece, value in zip(pieces, group.pieces, strict=True):
            piece.copy_(value)

    monkeypatch.setattr(exchange.dist, "all_gather", all_gather)
    whole = torch.arange(12 * tensor_parallel * replicas)
    stages = whole.chunk(replicas)
    for replica in range(replicas):
        shares = list(stages[replica].chunk(tensor_parallel))
        gather = exchange._Gather(Group(shares), Group(list(stages)))
        for share in shares:
            assert torch.equal(gather(share), whole)
