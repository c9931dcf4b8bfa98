# SPDX-License-Identifier: Apache-2.0
"""Slow links between pipeline stages, emulated: no root, any machine, MAPL or plain Megatron.

Every process delays its own sends as the link to the neighbouring stage would (`mapl.link`); then
the message goes over the real connection, which must be several times as fast. Processes of one
stage on one host share the host's links: all that they send to the next stage takes one direction
of one link. In a pipeline of two stages the next stage is the previous one too, by the same link.

As with gloo, a message waits for its receiver: see `megatron.mapl.emulated_connection`. Only for
gloo and for tensors on the CPU.
"""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch.distributed.constants import default_pg_timeout

from mapl.link import EmulatedLink, LinkClock
from megatron.mapl.emulated_connection import EmulatedConnection
from megatron.mapl.patching import replace

Direction = Literal["next", "prev"]

#: Python's default of 5 ms is how long a computing thread may keep a sending one from its work.
_SWITCH_SECONDS = 2e-4


class Operation(NamedTuple):
    """One tensor that is exchanged with a neighbouring stage.

    Attributes:
        kind: what this process does.
        tensor: what is sent, or the buffer that is filled; contiguous.
        direction: where the neighbour stands.
        peer: its global rank.
        group: a process group that holds both; emulated links have their own.
    """

    kind: Literal["send", "recv"]
    tensor: torch.Tensor
    direction: Direction
    peer: int
    group: Any


def transfer(operations: Sequence[Operation], emulation: "LinkEmulation | None") -> list[Any]:
    """Starts to send and receive, over the emulated links if there are any.

    What one process sends to another, in whatever directions, the other receives in the same order.

    Returns:
        Works to `wait()` for. Without emulation `torch.distributed.batch_isend_irecv` returns them,
        otherwise see `LinkEmulation.transfer`.
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
    """The links over which this process sends: `start` on all processes, `install`, `close`."""

    def __init__(self, connections: dict[Direction, EmulatedConnection]) -> None:
        """
        Args:
            connections: to the next and to the previous stage; one object if that is one stage.
        """
        self._connections = connections
        self._replaced: dict[str, Any] = {}
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(_SWITCH_SECONDS, self._switch_seconds))

    @classmethod
    def start(
        cls,
        *,
        bandwidth_mbit: float | None,
        latency_ms: float,
        stage: int,
        stages: int,
        timeout: timedelta = default_pg_timeout,
    ) -> "LinkEmulation":
        """Finds out who shares a link with whom; all processes call it, after `init_process_group`.

        Args:
            bandwidth_mbit: of each direction of each link, in 10⁶ bits a second; None: no limit.
            latency_ms: milliseconds, one way.
            stage: this process's place in the pipeline.
            stages: how many there are.
            timeout: how long a message may wait for its receiver.

        Raises:
            ValueError: a setting out of range, or a backend that is not gloo.
            RuntimeError: on all processes, if one cannot open the file that those of its host
                share.
        """
        if dist.get_backend() != "gloo":
            raise ValueError(
                "--mapl-emulate-bandwidth and --mapl-emulate-latency work with "
                f"--distributed-backend gloo alone, not with {dist.get_backend()}"
            )
        groups = (dist.new_group(timeout=timeout), dist.new_group(timeout=timeout))
        connections: dict[int, EmulatedConnection] = {}
        neighbours = _neighbours(stage, stages)
        for neighbour in dict.fromkeys(neighbours.values()):
            clock = _shared_clock(stage)
            link = EmulatedLink(bandwidth_mbit, latency_ms, clock)
            name = f"emulated link from stage {stage} to stage {neighbour}"
            connections[neighbour] = EmulatedConnection(name, link, clock, groups, timeout)
        return cls({direction: connections[stage] for direction, stage in neighbours.items()})

    def install(self) -> None:
        """Has Megatron's communicators use the links, until `close`.

        Raises:
            RuntimeError: a function that is to be replaced is not there.
        """
        for function in (self._batched_p2p_ops, self._p2p_ops):
            name = function.__name__
            original = getattr(p2p_communication, name, None)
            replace(p2p_communication, name, function)
            self._replaced[name] = original

    def close(self) -> None:
        """Waits until all is sent and received, and undoes `install`.

        To be called before the process group is destroyed.

        Raises:
            RuntimeError: a send failed.
        """
        sys.setswitchinterval(self._switch_seconds)
        while self._replaced:
            replace(p2p_communication, *self._replaced.popitem())
        connections = dict.fromkeys(self._connections.values())
        with ExitStack() as closing:  # all of them, even if one raises
            for connection in connections:
                closing.callback(connection.close)
            # All are told before one is waited for: around a ring each would wait for the next.
            for connection in connections:
                connection.end()

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """Starts to send and receive; the caller may free or change what it sends at once.

        Returns:
            One work an operation, in their order. The `wait()` of a send returns when the last byte
            has left, that of a receive when it has arrived; both raise what went wrong, a send also
            for one before it, whose fate was unknown when it was waited for.

        Raises:
            RuntimeError: an earlier send over the same link failed.
            ValueError: a tensor is not on the CPU.
        """
        works: list[Any] = []
        for op in operations:
            connection = self._connections[op.direction]
            start = connection.send if op.kind == "send" else connection.receive
            works.append(start(op.tensor, op.peer))
        return works

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

        The order matters where the next stage is the previous one too: what one sends to its next
        first, the other receives from its previous first.
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


def _neighbours(stage: int, stages: int) -> dict[Direction, int]:
    if stages == 1:
        return {}
    return {"next": (stage + 1) % stages, "prev": (stage - 1) % stages}


def _shared_clock(stage: int) -> LinkClock:
    """A clock for the processes of this stage on this host; all processes of the job call it.

    Raises:
        RuntimeError: on all processes, if one has failed.
    """
    # Machines of one name are told apart by their boot, containers of one machine by their names.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    here = (socket.gethostname(), boot, stage)
    leader = _gather(here).index(here)
    path = clock = error = None
    with ExitStack() as deleting:
        if dist.get_rank() == leader:
            try:
                path = LinkClock.create_file()
                deleting.callback(os.unlink, path)
            except OSError as failure:
                error = str(failure)
        shared = _gather(path)[leader]
        if shared is not None:
            try:
                clock = LinkClock(shared)
            except OSError as failure:
                error = str(failure)
        errors = _gather(error)  # by now all have opened it
    for rank, message in enumerate(errors):
        if message is not None:
            raise RuntimeError(
                f"--mapl-emulate-bandwidth: process {rank} cannot share a link with those of its "
                f"host: {message}; give them one directory for temporary files (TMPDIR)"
            )
    assert clock is not None
    return clock


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
