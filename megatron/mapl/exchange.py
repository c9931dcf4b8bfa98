# SPDX-License-Identifier: Apache-2.0
"""What the two sides of each boundary tell each other once a step.

- The projector's gradient: each side has its own term of dA. Every process sends its share of its
  side's term and receives the same share of the other's; a + b = b + a bit for bit, so the two
  sides form the same sums. Each side then gathers the shares over its replicas and tensor-parallel
  ranks, all of which so hold the same gradient, take the same deterministic step, and keep bitwise
  the same projector without ever sending it. In one step it may be the projector itself that
  crosses in the gradient's place (projector_start.py).
- Whole codebooks, where a codec wants it: sent in shares and gathered likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mapl.port import Port
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.transfers import wait_all
from megatron.mapl.transport import Direction, Operation, transfer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class _Item:
    """One thing to exchange at one end of one boundary.

    Attributes:
        peer: global rank of the process that holds the same at the other end.
        to_next: whether that end is the next stage.
        payload: what to send, or None.
        buffer: where to receive, or None.
        take: what to do with what arrived in `buffer`.
    """

    peer: int
    to_next: bool
    payload: Tensor | None = None
    buffer: Tensor | None = None
    take: Callable[[Tensor], None] | None = None


def run(runtime: MaplRuntime, replicas: Any) -> None:
    """Exchanges all that is due; to be called on every process of the pipeline.

    Args:
        replicas: the group of the data-parallel (and context-parallel) replicas.

    Raises:
        PayloadError: what arrived on a CPU was not what was due.
        PeerError: the other side is gone.
    """
    groups = runtime.stages[0].groups
    gather = _Gather(groups.tp, replicas)
    items = [
        item
        for port in runtime.ports()
        for item in (
            *_projector(runtime, port, groups.pp, gather),
            *_codebooks(runtime, port, groups.pp, gather),
        )
    ]
    with runtime.communicating():
        _transfer(items, groups.pp, runtime)
    for item in items:
        if item.buffer is not None and item.take is not None:
            item.take(item.buffer)


def _transfer(items: list[_Item], pipeline: Any, runtime: MaplRuntime) -> None:
    operations = []
    for item in items:
        direction: Direction = "next" if item.to_next else "prev"
        if item.payload is not None:
            operations.append(Operation("send", item.payload, direction, item.peer, pipeline))
        if item.buffer is not None:
            operations.append(Operation("recv", item.buffer, direction, item.peer, pipeline))
    works = transfer(operations, runtime.transport)
    wait_all(works, "the exchange between stages after a step", runtime.timeout)


class _Gather:
    """Puts the shares of all processes that hold the same together again."""

    def __init__(self, tensor_parallel: Any, replicas: Any) -> None:
        self._groups = (tensor_parallel, replicas)  # as `Place.step` counts: these ranks first

    def __call__(self, share: Tensor) -> Tensor:
        for group in self._groups:
            if group.size() > 1:
                pieces = [torch.empty_like(share) for _ in range(group.size())]
                dist.all_gather(pieces, share.contiguous(), group=group)
                share = torch.cat(pieces)
        return share


def _projector(runtime: MaplRuntime, port: Port, pipeline: Any, gather: _Gather) -> list[_Item]:
    gradient = None if port.projector is None else port.projector.grad
    if gradient is None:
        return []
    channel, dtype = port.projector_channel, _DTYPES[runtime.config.projector_exchange]
    data = gradient.to(dtype).flatten().view(torch.uint8)
    payload = channel.pack(data, runtime.ledger)

    def add(buffer: Tensor) -> None:
        other = channel.unpack(buffer, data.numel(), runtime.guard)
        # Both terms as they were sent, so that both sides form the same sum.
        total = channel.own(data).view(dtype).float() + other.view(dtype).float()
        gradient.copy_(gather(total)[: gradient.numel()].view_as(gradient))

    return [_Item(*_peer(port, pipeline), payload, torch.empty_like(payload), add)]


def _codebooks(runtime: MaplRuntime, port: Port, pipeline: Any, gather: _Gather) -> list[_Item]:
    items = []
    channels = {
        id(port.forward_codec): port.forward_codebook_channel,
        id(port.backward_codec): port.backward_codebook_channel,
    }
    for codec in port.codebook_codecs():
        if not codec.whole_due():
            continue
        channel, size = channels[id(codec)], codec.whole_bytes()
        item = _Item(*_peer(port, pipeline))
        if codec.sends:
            item.payload = channel.pack(codec.whole(), runtime.ledger)
        else:
            total = channel.layout_of(size).total_bytes
            item.buffer = torch.empty(total, dtype=torch.uint8, device=codec.codebook.device)

            def take(buffer: Tensor, codec: Any = codec, channel: Any = channel) -> None:
                size = codec.whole_bytes()
                share = channel.unpack(buffer, size, runtime.guard)
                codec.take_whole(gather(share)[:size])

            item.take = take
        items.append(item)
    return items


def _peer(port: Port, pipeline: Any) -> tuple[int, bool]:
    """Global rank of the other end, and whether it is the next stage."""
    stage = port.boundary + 1 if port.is_outlet else port.boundary
    return dist.get_global_rank(pipeline, stage % pipeline.size()), port.is_outlet
