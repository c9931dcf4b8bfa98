# SPDX-License-Identifier: Apache-2.0
"""Slow links between pipeline stages, emulated: no root, any machine, MAPL or plain Megatron.

Every process delays its own sends as the link to the neighbouring stage would (`mapl.link`); then
the message goes over the real connection, which must be several times as fast. Processes of one
stage on one host share the host's links: all that they send to the next stage takes one direction
of one link. In a pipeline of two stages the next stage is the previous one too, by the same link.

As with gloo, a message waits for its receiver: see `megatron.mapl.emulated_connection`. Only for
gloo and for tensors on the CPU; those of a GPU are staged there (`megatron.mapl.staging`).
"""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from mapl.link import EmulatedLink, LinkClock
from megatron.mapl.emulated_connection import EmulatedConnection
from megatron.mapl.transport import SWITCH_SECONDS, Direction, Operation


class LinkEmulation:
    """The links over which this process sends, a `Transport`; all processes `start` and `close`."""

    def __init__(self, connections: dict[Direction, EmulatedConnection]) -> None:
        """
        Args:
            connections: to the next and to the previous stage; one object if that is one stage.
        """
        self._connections = connections
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))

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

    def close(self) -> None:
        """Waits until all is sent and received; to be called before the process group's end.

        Raises:
            RuntimeError: a send failed.
        """
        sys.setswitchinterval(self._switch_seconds)
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
