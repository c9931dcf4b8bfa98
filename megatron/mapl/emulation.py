# SPDX-License-Identifier: Apache-2.0
"""Slow links between pipeline stages, emulated: no root, any machine, MAPL or plain Megatron.

Every process delays its own sends as the link to the neighbouring stage would (`mapl.link`); the
transfer itself then goes over the real connection, which must be several times as fast. Processes
of one stage on one host share the host's links: all that goes from stage p to stage q is one
direction of one link. In a pipeline of two stages the next stage is also the previous one, and
there is one link, not two.

As with a socket, a send is over when its last byte has left, whether or not anybody receives; what
is received late was waiting. Only for gloo and tensors on the CPU.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication

from mapl.link import DelayedSender, Delivery, EmulatedLink, LinkClock, sleep_until
from megatron.mapl.patching import replace

Direction = Literal["next", "prev"]

#: Marks delayed messages: an undelayed one between the same processes must not be taken for one.
_TAG = 1
#: Bytes that any loopback passes in well under a millisecond.
_SMALL = 128 * 1024


class Operation(NamedTuple):
    """One tensor that is exchanged with a neighbouring stage.

    Attributes:
        kind: what this process does.
        tensor: what is sent, or the buffer that is filled; contiguous.
        direction: where the neighbour stands.
        peer: its global rank.
        group: a process group that holds both.
    """

    kind: Literal["send", "recv"]
    tensor: torch.Tensor
    direction: Direction
    peer: int
    group: Any


def transfer(operations: Sequence[Operation], emulation: "LinkEmulation | None") -> list[Any]:
    """Starts to send and receive, over the emulated links if there are any.

    Both sides name the tensors that they exchange in the same order.

    Returns:
        Transfers to `wait()` for: one an operation and in their order without NCCL, otherwise as
        `torch.distributed.batch_isend_irecv` returns them.
    """
    if emulation is not None:
        return emulation.transfer(operations)
    if not operations:
        return []
    functions = {"send": dist.isend, "recv": dist.irecv}
    return dist.batch_isend_irecv(
        [dist.P2POp(functions[op.kind], op.tensor, op.peer, op.group) for op in operations]
    )


class LinkEmulation:
    """The links over which this process sends.

    Use: `start` on all processes, `install`, train, `close`.
    """

    def __init__(self, links: "dict[Direction, _Outgoing]") -> None:
        """
        Args:
            links: to the next and to the previous stage; the same object if that is one stage.
        """
        self._links = links
        self._replaced: dict[str, Any] = {}

    @classmethod
    def start(
        cls, *, bandwidth_mbit: float | None, latency_ms: float, stage: int, stages: int
    ) -> "LinkEmulation":
        """Finds out who shares a link with whom; all processes call it, after `init_process_group`.

        Args:
            bandwidth_mbit: of each direction of each link, in 10⁶ bits a second; None: unlimited.
            latency_ms: milliseconds, one way.
            stage: this process's place in the pipeline.
            stages: how many there are.

        Raises:
            ValueError: a setting out of range, or a backend that is not gloo.
            RuntimeError: on all processes, if one of them cannot open the file that processes of
                its host share.
        """
        if dist.get_backend() != "gloo":
            raise ValueError(
                "--mapl-emulate-bandwidth and --mapl-emulate-latency work with "
                f"--distributed-backend gloo, not with {dist.get_backend()}"
            )
        by_stage: dict[int, _Outgoing] = {}
        links: dict[Direction, _Outgoing] = {}
        for direction, neighbour in _neighbours(stage, stages).items():
            if neighbour not in by_stage:
                clock = _shared_clock(stage)
                name = f"emulated link from stage {stage} to stage {neighbour}"
                link = EmulatedLink(bandwidth_mbit, latency_ms, clock)
                by_stage[neighbour] = _Outgoing(link, DelayedSender(name), clock)
            links[direction] = by_stage[neighbour]
        return cls(links)

    def install(self) -> None:
        """Has all of Megatron's communicators use the links, until `close`.

        Raises:
            RuntimeError: what is to be replaced is not there.
        """
        for name, function in (
            ("_batched_p2p_ops", self._batched_p2p_ops),
            ("_p2p_ops", self._p2p_ops),
        ):
            original = getattr(p2p_communication, name, None)
            replace(p2p_communication, name, function)
            self._replaced[name] = original

    def close(self) -> None:
        """Waits until all is sent, ends the threads, and gives Megatron its functions back.

        Raises:
            RuntimeError: a send failed.
        """
        while self._replaced:
            replace(p2p_communication, *self._replaced.popitem())
        for link in set(self._links.values()):
            link.close()

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """As `transfer` above, one result for each operation.

        The `wait()` of a send returns when the last byte has left.

        Raises:
            RuntimeError: an earlier send over the same link failed. The `wait()` of a send raises
                it too, and the `wait()` of a receive whatever befell it.
        """
        return [
            self._links[op.direction].send(op) if op.kind == "send" else _Receiving(op)
            for op in operations
        ]

    def _p2p_ops(
        self,
        *,
        tensor_send_prev: torch.Tensor | None,
        tensor_recv_prev: torch.Tensor | None,
        tensor_send_next: torch.Tensor | None,
        tensor_recv_next: torch.Tensor | None,
        group: Any,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> dict[str, Any]:
        """Megatron's function of that name: its arguments, its names of results.

        The order matters where next and previous stage are one: what is sent to the next must be
        received first from the previous.
        """
        operations: dict[str, Operation] = {}
        if tensor_recv_prev is not None:
            operations["recv_prev"] = Operation(
                "recv", tensor_recv_prev, "prev", prev_pipeline_rank, group
            )
        if tensor_send_next is not None:
            operations["send_next"] = Operation(
                "send", tensor_send_next, "next", next_pipeline_rank, group
            )
        if tensor_recv_next is not None:
            operations["recv_next"] = Operation(
                "recv", tensor_recv_next, "next", next_pipeline_rank, group
            )
        if tensor_send_prev is not None:
            operations["send_prev"] = Operation(
                "send", tensor_send_prev, "prev", prev_pipeline_rank, group
            )
        works = self.transfer(list(operations.values()))
        return dict(zip(operations, works, strict=True))

    def _batched_p2p_ops(self, **arguments: Any) -> list[Any]:
        """Megatron's function of that name."""
        return list(self._p2p_ops(**arguments).values())


class _Outgoing:
    """One link as this process sends over it."""

    def __init__(self, link: EmulatedLink, sender: DelayedSender, clock: LinkClock) -> None:
        self._link, self._sender, self._clock = link, sender, clock

    def send(self, operation: Operation) -> "_Sending":
        """Books the link for a copy of the tensor, whose owner may change it once it has left."""
        size = operation.tensor.nbytes
        leaves_at, arrives_at = self._link.schedule(size)
        data = _bytes_of(operation.tensor).clone()
        for begin, end in _pieces(size):
            start = partial(_start, dist.isend, data[begin:end], operation)
            due = arrives_at - self._link.seconds(size - end)
            last = self._sender.submit(due, start)
        return _Sending(self._sender, leaves_at, last)

    def close(self) -> None:
        try:
            self._sender.close()
        finally:
            self._clock.close()


class _Sending:
    """A send under way, in place of a `torch.distributed.Work`."""

    def __init__(self, sender: DelayedSender, leaves_at: float, last: Delivery) -> None:
        self._sender, self._leaves_at, self._last = sender, leaves_at, last

    def wait(self) -> bool:
        """Returns when the last byte has left.

        Raises:
            RuntimeError: this send failed, as far as is known by then, or one before it.
        """
        sleep_until(self._leaves_at)
        if self._last.due <= self._leaves_at:
            self._sender.wait_for_start(self._last)
        self._sender.raise_if_failed()
        return True


class _Receiving:
    """A receive under way: posted at once, in the pieces in which it is sent."""

    def __init__(self, operation: Operation) -> None:
        data = _bytes_of(operation.tensor)
        self._works = [
            _start(dist.irecv, data[begin:end], operation) for begin, end in _pieces(len(data))
        ]

    def wait(self) -> bool:
        """Returns when the tensor is there; raises what `torch.distributed` raises."""
        while self._works:
            self._works.pop(0).wait()
        return True


def _start(function: Callable[..., Any], piece: torch.Tensor, operation: Operation) -> Any:
    return function(piece, operation.peer, operation.group, _TAG)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """How `size` bytes are cut: begin and end of each piece, by one rule for both sides.

    A message that began its way over the real connection only when its last byte is due would be
    late by the time of that way. So the first half goes when its own last byte is due, then half of
    the rest, until little is left to be late.
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
    # Another tensor over the same memory: Megatron takes it from a tensor that it has sent.
    return tensor.detach().view(-1).view(torch.uint8)


def _neighbours(stage: int, stages: int) -> dict[Direction, int]:
    if stages == 1:
        return {}
    return {"next": (stage + 1) % stages, "prev": (stage - 1) % stages}


def _shared_clock(stage: int) -> LinkClock:
    """One clock for all processes of this stage on this host; all processes of the job call it.

    Raises:
        RuntimeError: on all processes, if one has failed.
    """
    # Machines of one name are told apart by their boot, containers of one boot by their names.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    here = (socket.gethostname(), boot, stage)
    leader = _gather(here).index(here)
    path = clock = error = None
    try:
        if dist.get_rank() == leader:
            path = LinkClock.create_file()
    except OSError as failure:
        error = str(failure)
    try:
        if (shared := _gather(path)[leader]) is not None:
            clock = LinkClock(shared)
    except OSError as failure:
        error = str(failure)
    errors = _gather(error)
    if path is not None:
        os.unlink(path)
    for rank, message in enumerate(errors):
        if message is not None:
            raise RuntimeError(
                f"--mapl-emulate-bandwidth: process {rank} cannot share a link with the others of "
                f"its host: {message}; they need one directory for temporary files"
            )
    assert clock is not None
    return clock


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
