# SPDX-License-Identifier: Apache-2.0
"""The boundaries of a pipeline inside one process: for studies of quality on one GPU or CPU.

The model is cut where the equal stages of a pipeline would end. At each cut stand both ends of a
boundary, the same modules as in a pipeline. What one end packs the other unpacks, so that the
numbers and the bytes are those of a pipeline; only nothing waits for a network.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.mapl.model import StageBoundaries, input_ids
from megatron.mapl.port import PAYLOAD, take_payload
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.transport import OPPOSITE, Operation


class VirtualStages(nn.ModuleList):
    """The boundaries of a chunk that holds the whole model, stage by stage."""

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `StageBoundaries.sharded_state_dict`; the checkpoint is that of a pipeline."""
        sharded: dict[str, Any] = {}
        for name, stage in self.named_children():
            assert isinstance(stage, StageBoundaries)
            sharded |= stage.sharded_state_dict(f"{prefix}{name}.", *args, **kwargs)
        return sharded


def attach(chunks: list[Any], runtime: MaplRuntime) -> list[Any]:
    """Megatron's pre-wrap hook, as `model.attach`, for a pipeline of one stage."""
    (chunk,) = chunks
    count = len(runtime.plan.ranks) + 1
    ends = range(0, chunk.config.num_layers + 1, chunk.config.num_layers // count)
    stages = [
        StageBoundaries(
            runtime,
            chunk.config,
            chunk.pg_collection,
            stage=number,
            layers=range(first, last),
            receives=number > 0,
            sends=number < count - 1,
        )
        for number, (first, last) in enumerate(pairwise(ends))
    ]
    chunk.mapl = VirtualStages(stages)
    runtime.stages[:] = stages
    runtime.transport = Loopback()
    chunk.register_forward_pre_hook(_before_forward, with_kwargs=True)
    for sender, receiver in pairwise(stages):
        layer = chunk.decoder.layers[receiver.first_layer]
        layer.register_forward_pre_hook(partial(_before_layer, sender, receiver), with_kwargs=True)
    return chunks


def _before_forward(chunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    chunk.mapl[0].start(input_ids(args, kwargs))


def _before_layer(
    sender: StageBoundaries,
    receiver: StageBoundaries,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    crossed = cross(sender, receiver, hidden)
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": crossed}
    return (crossed, *args[1:]), kwargs


def cross(sender: StageBoundaries, receiver: StageBoundaries, hidden: Tensor) -> Tensor:
    """X̂ at the receiving stage from X at the sending one, both [s, b, d]; gradients cross back."""
    latent = sender.send(hidden)
    arrived: Tensor = _Crossing.apply(latent, sender, receiver)
    setattr(arrived, PAYLOAD, take_payload(latent, "a virtual stage"))
    return receiver.receive(arrived)


class _Crossing(torch.autograd.Function):
    """The link: what arrives is empty until its payload is unpacked, in both directions."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, sender: StageBoundaries, receiver: StageBoundaries
    ) -> Tensor:
        ctx.sender, ctx.receiver = sender, receiver
        return torch.empty_like(latent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        ctx.receiver.pack_gradient(gradient)
        return ctx.sender.unpack_gradient(gradient), None, None


class Loopback:
    """A `Transport` from a process to itself, for what stages exchange once a step."""

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """Copies what is sent to where it is received; nothing is left to wait for."""
        sent: defaultdict[str, deque[Tensor]] = defaultdict(deque)
        for operation in operations:
            if operation.kind == "send":
                sent[operation.direction].append(operation.tensor)
        for operation in operations:
            if operation.kind == "recv":
                operation.tensor.copy_(sent[OPPOSITE[operation.direction]].popleft())
        assert not any(sent.values()), "something was sent that nobody receives"
        return []
