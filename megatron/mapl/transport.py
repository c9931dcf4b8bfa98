# SPDX-License-Identifier: Apache-2.0
"""How tensors get from one pipeline stage to its neighbours, whoever asks for it.

Two ask: Megatron's communicator, which ends in two functions of a module of its own, and the
exchange after a step. A `Transport` takes the place of both; without one they use
`torch.distributed` as Megatron does.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication

from megatron.mapl.patching import replace

Direction = Literal["next", "prev"]

#: How the direction of a message is called by who receives it.
OPPOSITE: dict[Direction, Direction] = {"next": "prev", "prev": "next"}

#: Python's default of 5 ms is how long a computing thread may keep a sending one from its work.
SWITCH_SECONDS = 2e-4


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


class Transport(Protocol):
    """Starts transfers between stages."""

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """Starts them; one work to `wait()` for an operation, in their order."""


def transfer(operations: Sequence[Operation], transport: Transport | None) -> list[Any]:
    """Starts to send and receive.

    What one process sends to another, in whatever directions, the other receives in the same order.

    Returns:
        Works to `wait()` for. Without a transport `torch.distributed.batch_isend_irecv` returns
        them.
    """
    if transport is not None:
        return transport.transfer(operations)
    if not operations:
        return []
    functions = {"send": dist.isend, "recv": dist.irecv}
    return dist.batch_isend_irecv(
        [dist.P2POp(functions[op.kind], op.tensor, op.peer, op.group) for op in operations]
    )


class MegatronTransfers:
    """Megatron's two functions that start transfers, replaced by a transport until `undo`."""

    def __init__(self, transport: Transport) -> None:
        """
        Raises:
            RuntimeError: a function that is to be replaced is not there.
        """
        self._transport = transport
        self._replaced: dict[str, Any] = {}
        for function in (self._batched_p2p_ops, self._p2p_ops):
            name = function.__name__
            original = getattr(p2p_communication, name, None)
            replace(p2p_communication, name, function)
            self._replaced[name] = original

    def undo(self) -> None:
        """Puts Megatron's own back."""
        while self._replaced:
            replace(p2p_communication, *self._replaced.popitem())

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
        works = self._transport.transfer(list(operations.values()))
        return dict(zip(operations, works, strict=True))

    def _batched_p2p_ops(self, **arguments: Any) -> list[Any]:
        """Megatron's function of that name."""
        return list(self._p2p_ops(**arguments).values())
