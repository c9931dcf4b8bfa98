# SPDX-License-Identifier: Apache-2.0
"""One end of one boundary, and how payloads ride on the tensors of Megatron's schedule.

Megatron passes the same tensor objects from the model to the communicator and back, so a payload
travels as the attribute `PAYLOAD` of the tensor that stands for it.
"""

import hashlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from mapl.channel import Channel, Share
from mapl.codecs import CodecEnd, LowRankCodec, ResidualVQCodec, Role, build_codec
from mapl.parcel import ParcelChannel
from mapl.payload import Direction, PayloadLayout
from mapl.projectors import PROJECTORS, Projector
from megatron.mapl.runtime import MaplRuntime

#: The attribute under which a tensor in Megatron's schedule carries its payload.
PAYLOAD = "mapl_payload"


def private_seed(seed: int, purpose: str, index: int) -> int:
    """A seed of its own for each purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def private_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that no draw moves Megatron's generators."""
    return torch.Generator().manual_seed(private_seed(seed, purpose, index))


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


@dataclass(frozen=True)
class Place:
    """Where a stage's process stands among those that hold the same, or part of the same.

    Attributes:
        tokens: which part of a micro-batch this process sends (of those that hold all of it).
        step: which part of once-a-step data it sends.
        sender: a number of its own for each process that sends other tokens.
    """

    tokens: Share
    step: Share
    sender: int


class Port(nn.Module):
    """One end of one boundary: the projector, the codecs and the channels of both directions.

    Attributes:
        boundary: its number in the pipeline, from 0.
        cut: how many layers of the model come before it.
        is_outlet: whether activations leave here (and gradients arrive), or the other way round.
        projector: A, or None on a boundary without one, over which X itself goes.
        forward_codec, backward_codec: of activations and of their gradients.
        forward_channel, backward_channel, projector_channel, forward_codebook_channel,
            backward_codebook_channel: how they, and once a step the projector's gradient and whole
            codebooks, cross.
        payloads: int64 [2], how many payloads went forward and back, as a checkpoint keeps it.
    """

    def __init__(
        self,
        runtime: MaplRuntime,
        boundary: int,
        cut: int,
        *,
        is_outlet: bool,
        place: Place,
        virtual: bool,
    ) -> None:
        super().__init__()
        plan, config = runtime.plan, runtime.config
        self.boundary, self.cut, self.is_outlet = boundary, cut, is_outlet
        self.projector: Projector | None = None
        rank = plan.ranks[boundary]
        if rank and config.projector != "none":
            # All boundaries start from one subspace: what the first one keeps, the next ones keep
            # too. Independent ones would each lose most of what is left.
            generator = private_generator(runtime.seed, "projector", 0)
            self.projector = PROJECTORS[config.projector](plan.hidden_size, rank, generator)
        # An uncompressed boundary passes the ids on if a later one needs them. Virtual stages share
        # a link, over which all payloads have one size.
        ids_needed = config.anchor != "none" and (virtual or any(plan.ranks[boundary:]))

        def channel(direction: Direction, name: str, role: Role, *, sends: bool) -> Channel:
            end = CodecEnd(
                role=role,
                width=plan.width(boundary),
                dtype=runtime.pipeline_dtype,
                seed=private_seed(runtime.seed, f"codec {direction.name}", boundary),
                settings=config.codec_settings,
                shards=place.tokens.count,
                shard=place.tokens.index,
                sender=place.sender,
                sends=sends,
            )
            codec = build_codec(name, end)
            layout = PayloadLayout(boundary, direction, vocab_size=runtime.vocab_size)
            ids = ids_needed and direction is Direction.FORWARD
            return Channel(layout, plan.width(boundary), codec, carries_ids=ids, share=place.tokens)

        def parcels(direction: Direction, kind: str) -> ParcelChannel:
            return ParcelChannel(PayloadLayout(boundary, direction), kind, place.step)

        self.forward_channel = channel(
            Direction.FORWARD, plan.forward_codecs[boundary], Role.ACTIVATION, sends=is_outlet
        )
        self.backward_channel = channel(
            Direction.BACKWARD, plan.backward_codecs[boundary], Role.GRADIENT, sends=not is_outlet
        )
        self.forward_codec, self.backward_codec = (
            self.forward_channel.codec,
            self.backward_channel.codec,
        )
        self.projector_channel = parcels(Direction.PROJECTOR, "projector")
        self.forward_codebook_channel = parcels(Direction.FORWARD_CODEBOOK, "codebook")
        self.backward_codebook_channel = parcels(Direction.BACKWARD_CODEBOOK, "codebook")
        self.register_buffer("payloads", torch.zeros(2, dtype=torch.int64))

    payloads: torch.Tensor

    def note_counts(self) -> None:
        """Writes the channels' counts where a checkpoint finds them; nothing is under way then."""
        channels = (self.forward_channel, self.backward_channel)
        # One end has sent what the other has received.
        counts = [max(channel.sent, channel.received) for channel in channels]
        self.payloads.copy_(torch.tensor(counts))

    def take_counts(self) -> None:
        """Goes on counting where the checkpoint that was loaded left off."""
        channels = (self.forward_channel, self.backward_channel)
        for channel, count in zip(channels, self.payloads.tolist(), strict=True):
            channel.sent = channel.received = count

    def shared_states(self) -> dict[str, list[torch.Tensor]]:
        """What both ends must hold alike, bit for bit, by its name in an error."""
        states = {}
        if self.projector is not None:
            states["projector"] = list(self.projector.state_dict().values())
        for direction, codec in (
            ("forward", self.forward_codec),
            ("backward", self.backward_codec),
        ):
            if isinstance(codec, ResidualVQCodec):
                states[f"{direction} codebook"] = [codec.codebook]
        return states

    def codebook_codecs(self) -> list[ResidualVQCodec]:
        """The codecs that keep codebooks, activations first."""
        codecs = (self.forward_codec, self.backward_codec)
        return [codec for codec in codecs if isinstance(codec, ResidualVQCodec)]

    def sending_lowrank_codec(self) -> LowRankCodec | None:
        """The one that encodes gradients here, if it keeps an error."""
        codec = self.backward_codec
        return codec if isinstance(codec, LowRankCodec) and codec.sends else None
