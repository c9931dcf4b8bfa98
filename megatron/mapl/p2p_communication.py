# SPDX-License-Identifier: Apache-2.0
"""The communicator: moves payloads where Megatron's moves activations.

It knows sizes, not meanings: the model packs and unpacks (model.py), so that what it sends and
receives is one flat uint8 tensor a direction, of a size that both sides know beforehand.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mapl.channel import Channel
from megatron.mapl.port import PAYLOAD, take_payload
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.transfers import InFlight, wait


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
        to_prev = _payload_of(tensor_send_prev, "backward")
        to_next = _payload_of(tensor_send_next, "forward")
        if runtime.in_flight is not None:
            shapes = (tensor_shape, *(t.shape for t in (tensor_send_next, tensor_send_prev)
                                      if t is not None))  # fmt: skip
            tokens = next(tuple(shape[:2]) for shape in shapes if shape is not None)
            with runtime.communicating():
                leaves = self._ahead(
                    runtime.in_flight, to_prev, to_next, recv_prev, recv_next, tokens
                )
            return *leaves, None
        from_prev = from_next = None
        if recv_prev:
            from_prev = self._expect(runtime.inlets()[0].forward_channel, tensor_shape)
        if recv_next:
            from_next = self._expect(runtime.outlets()[0].backward_channel, tensor_shape)
        buffers = {
            "tensor_send_prev": to_prev,
            "tensor_recv_prev": _buffer_of(from_prev),
            "tensor_send_next": to_next,
            "tensor_recv_next": _buffer_of(from_next),
        }
        batched = self.config.batch_p2p_comm
        with runtime.communicating():
            works = self._start(**buffers)
            if wait_on_reqs:
                for work in works if batched else works.values():
                    wait(work, "a payload", runtime.timeout)
                if batched and self.config.batch_p2p_sync:
                    torch.cuda.synchronize()
                return from_prev, from_next, None
        assert not batched, "Megatron waits on batched transfers at once"
        handles = {
            name: _Transfer(work, buffers["tensor_" + name], runtime)
            for name, work in works.items()
        }
        return from_prev, from_next, handles

    def _start(self, **buffers: torch.Tensor | None) -> Any:
        """Starts transfers as Megatron does; the functions are looked up when they are needed."""
        batched = self.config.batch_p2p_comm
        ops = p2p_communication._batched_p2p_ops if batched else p2p_communication._p2p_ops
        names = ("tensor_send_prev", "tensor_recv_prev", "tensor_send_next", "tensor_recv_next")
        return ops(
            **{name: buffers.get(name) for name in names},
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )

    def _start_one(self, name: str, buffer: torch.Tensor) -> tuple[Any, torch.Tensor]:
        works = self._start(**{name: buffer})
        (work,) = works.values() if isinstance(works, dict) else works
        return work, buffer

    def _ahead(
        self,
        in_flight: InFlight,
        to_prev: torch.Tensor | None,
        to_next: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tokens: tuple[int, ...],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Starts what is to be sent, receives what is due, and posts what comes later."""
        channels = {
            "prev": [port.forward_channel for port in self._runtime.inlets()],
            "next": [port.backward_channel for port in self._runtime.outlets()],
        }
        starts = {
            side: partial(self._start_receive, side, channel[0], tokens)
            for side, channel in channels.items()
            if channel
        }
        for side, start in starts.items():
            in_flight.post(side, start)
        for side, payload in (("prev", to_prev), ("next", to_next)):
            if payload is not None:
                work, _ = self._start_one(f"tensor_send_{side}", payload)
                in_flight.send(side, work, payload, self._said(side, "sending to"))
        leaves: list[torch.Tensor | None] = []
        for side, due in (("prev", recv_prev), ("next", recv_next)):
            if not due:
                leaves.append(None)
                continue
            buffer = in_flight.receive(side, self._said(side, "waiting for"))
            leaves.append(self._leaf(channels[side][0], tokens, buffer))
            in_flight.post(side, starts[side])
        return leaves[0], leaves[1]

    def _start_receive(
        self, side: str, channel: Channel, tokens: tuple[int, ...]
    ) -> tuple[Any, torch.Tensor]:
        return self._start_one(f"tensor_recv_{side}", self._buffer(channel, tokens))

    def _said(self, side: str, doing: str) -> str:
        peer = self.prev_rank if side == "prev" else self.next_rank
        stage = {"prev": "previous", "next": "next"}[side]
        return (
            f"rank {self.pp_group.rank()} of the pipeline, {doing} the {stage} stage, rank {peer}"
        )

    def _expect(self, channel: Channel, tensor_shape: Sequence[int] | None) -> torch.Tensor:
        """A leaf [s, b, width] that carries the buffer of the payload that is to arrive."""
        assert tensor_shape is not None, "Megatron names the shape of what it receives"
        tokens = tuple(tensor_shape[:2])
        return self._leaf(channel, tokens, self._buffer(channel, tokens))

    def _buffer(self, channel: Channel, tokens: tuple[int, ...]) -> torch.Tensor:
        size = channel.layout_of(tokens).total_bytes
        return torch.empty(size, dtype=torch.uint8, device=torch.cuda.current_device())

    def _leaf(
        self, channel: Channel, tokens: tuple[int, ...], buffer: torch.Tensor
    ) -> torch.Tensor:
        leaf = torch.empty(
            (*tokens, channel.width),
            dtype=self.config.pipeline_dtype,
            device=buffer.device,
            requires_grad=True,
        )
        setattr(leaf, PAYLOAD, buffer)
        return leaf


def receiving_ahead(
    schedule: Callable[..., Any], depth: int, runtime: MaplRuntime
) -> Callable[..., Any]:
    """Megatron's schedule without virtual stages, its transfers off the critical path."""

    def run(*, num_microbatches: int, forward_only: bool = False, **kwargs: Any) -> Any:
        runtime.in_flight = InFlight(
            depth, num_microbatches, forward_only=forward_only, timeout=runtime.timeout
        )
        try:
            result = schedule(
                num_microbatches=num_microbatches, forward_only=forward_only, **kwargs
            )
            with runtime.communicating():
                runtime.in_flight.drain()
        finally:
            runtime.in_flight = None
        return result

    return run


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
                wait(self._work, "a payload", self._runtime.timeout)
            self._work = self._buffer = None
