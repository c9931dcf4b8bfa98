# SPDX-License-Identifier: Apache-2.0
"""One end of one boundary, and how payloads ride on the tensors of Megatron's schedule.

Megatron passes the same tensor objects from the model to the communicator and back, so a payload
travels as the attribute `PAYLOAD` of the tensor that stands for it.
"""

import hashlib
from typing import cast

import torch
from torch import nn

from mapl.channel import Channel
from mapl.codecs import DtypeCodec
from mapl.payload import Direction, PayloadLayout, id_size
from mapl.projectors import PROJECTORS, Projector
from megatron.mapl.runtime import MaplRuntime

#: The attribute under which a tensor in Megatron's schedule carries its payload.
PAYLOAD = "mapl_payload"


def private_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that no draw moves Megatron's generators."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def take_payload(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The payload that `tensor` carries; taken off, so that it can be freed after its use.

    Raises:
        RuntimeError: it carries none: something between model and network made another tensor.
    """
    payload = tensor.__dict__.pop(PAYLOAD, None)
    if payload is None:
        raise RuntimeError(
            f"{where}: a tensor without a payload came through Megatron's schedule; a feature that "
            "replaces tensors between model and network cannot be used with --mapl-rank"
        )
    return cast(torch.Tensor, payload)


class Port(nn.Module):
    """One end of one boundary: the projector and the channels of both directions.

    Attributes:
        boundary: its number in the pipeline, from 0.
        cut: how many layers of the model come before it.
        projector: A, or None on an uncompressed boundary, over which X itself goes.
        forward_channel, backward_channel, projector_channel: how activations, their gradients and
            the projector's gradient cross.
    """

    def __init__(self, runtime: MaplRuntime, boundary: int, cut: int, *, virtual: bool) -> None:
        super().__init__()
        plan, config = runtime.plan, runtime.config
        self.boundary, self.cut = boundary, cut
        self.projector: Projector | None = None
        rank = plan.ranks[boundary]
        if rank:
            # All boundaries start from one subspace: what the first one keeps, the next ones keep
            # too. Independent ones would each lose most of what is left.
            generator = private_generator(runtime.seed, "projector", 0)
            self.projector = PROJECTORS[config.projector](plan.hidden_size, rank, generator)
        # An uncompressed boundary passes the ids on if a later one needs them. Virtual stages share
        # a link, over which all payloads have one size.
        ids_needed = config.anchor != "none" and (virtual or any(plan.ranks[boundary:]))
        width = plan.width(boundary)

        def channel(direction: Direction, codec: DtypeCodec, ids: bool) -> Channel:
            layout = PayloadLayout(boundary, direction, 0, id_size=id_size(runtime.vocab_size))
            return Channel(layout, width, codec, carries_ids=ids)

        pipeline = DtypeCodec(runtime.pipeline_dtype)
        self.forward_channel = channel(Direction.FORWARD, pipeline, ids_needed)
        self.backward_channel = channel(Direction.BACKWARD, pipeline, False)
        self.projector_channel = channel(Direction.PROJECTOR, DtypeCodec(torch.float32), False)
