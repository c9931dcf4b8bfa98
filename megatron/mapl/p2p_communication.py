# SPDX-License-Identifier: Apache-2.0
"""The communicator: moves payloads where Megatron's moves activations.

It knows sizes, not meanings: the model packs and unpacks (model.py), so that what it sends and
receives is one flat uint8 tensor a direction, of a size that both sides know beforehand.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mapl.channel import Channel
from megatron.mapl.port import PAYLOAD, take_payload
from megatron.mapl.runtime import MaplRuntime


class MaplP2PCommunicator(P2PCommunicator):
    """Megatron's communicator with payloads on the wire.

    All of its public methods end in `_communicate`, which alone is replaced.
    """

    def __init__(self, pp_group: Any, config: Any, *, runtime: MaplRuntime) -> None:
        super().__init__(pp_group, config)
        self._runtime = runtime

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int] | None,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Sends and receives payloads; the arguments and results are Megatron's.

        Received tensors are leaves that carry their payload and are filled by the model, after
        `wait()`: with overlapped communication the schedule stores them before.
        """
        runtime = self._runtime
        from_prev = from_next = None
        if recv_prev:
            from_prev = self._expect(runtime.inlets()[0].forward_channel, tensor_shape)
        if recv_next:
            from_next = self._expect(runtime.outlets()[0].backward_channel, tensor_shape)
        buffers = {
            "tensor_send_prev": _payload_of(tensor_send_prev, "backward"),
            "tensor_recv_prev": _buffer_of(from_prev),
            "tensor_send_next": _payload_of(tensor_send_next, "forward"),
            "tensor_recv_next": _buffer_of(from_next),
        }
        batched = self.config.batch_p2p_comm
        ops = p2p_communication._batched_p2p_ops if batched else p2p_communication._p2p_ops
        with runtime.communicating():
            works = ops(
                **buffers,
                group=self.pp_group,
                prev_pipeline_rank=self.prev_rank,
                next_pipeline_rank=self.next_rank,
            )
            if wait_on_reqs:
                for work in works if batched else works.values():
                    work.wait()
                if batched and self.config.batch_p2p_sync:
                    torch.cuda.synchronize()
                return from_prev, from_next, None
        assert not batched, "Megatron waits on batched transfers at once"
        handles = {
            name: _Transfer(work, buffers["tensor_" + name], runtime)
            for name, work in works.items()
        }
        return from_prev, from_next, handles

    def _expect(self, channel: Channel, tensor_shape: Sequence[int] | None) -> torch.Tensor:
        """A leaf [s, b, width] that carries the buffer of the payload that is to arrive."""
        assert tensor_shape is not None, "Megatron names the shape of what it receives"
        tokens = tuple(tensor_shape[:2])
        device = torch.cuda.current_device()
        leaf = torch.empty(
            (*tokens, channel.width),
            dtype=self.config.pipeline_dtype,
            device=device,
            requires_grad=True,
        )
        size = channel.layout_of(tokens).total_bytes
        setattr(leaf, PAYLOAD, torch.empty(size, dtype=torch.uint8, device=device))
        return leaf


def _payload_of(tensor: torch.Tensor | None, direction: str) -> torch.Tensor | None:
    return None if tensor is None else take_payload(tensor, f"sending {direction}")


def _buffer_of(leaf: torch.Tensor | None) -> torch.Tensor | None:
    return None if leaf is None else getattr(leaf, PAYLOAD)


class _Transfer:
    """A transfer under way; keeps its buffer alive until it is waited for."""

    def __init__(self, work: Any, buffer: torch.Tensor | None, runtime: MaplRuntime) -> None:
        self._work, self._buffer, self._runtime = work, buffer, runtime

    def wait(self) -> None:
        """Waits as Megatron does for its own transfers; a second call does nothing."""
        if self._work is not None:
            with self._runtime.communicating():
                self._work.wait()
            self._work = self._buffer = None
