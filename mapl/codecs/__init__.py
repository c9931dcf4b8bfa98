# SPDX-License-Identifier: Apache-2.0
"""How a tensor becomes the body of a payload."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mapl.codecs.base import Codec, Role
from mapl.codecs.counter_random import stream_key
from mapl.codecs.lowrank import LowRankCodec
from mapl.codecs.numeric import DtypeCodec
from mapl.codecs.residual_vq import ResidualVQCodec
from mapl.codecs.scaled import Fp8Codec, Int4Codec, Int8Codec, ScaledCodec
from mapl.codecs.settings import (
    LOWRANK_FORWARD,
    CodecSettings,
    check_lowrank,
    check_rvq,
    check_topk,
    default_rvq_groups,
)
from mapl.codecs.topk import TopKCodec

__all__ = [
    "CODECS",
    "Codec",
    "CodecEnd",
    "CodecSettings",
    "DtypeCodec",
    "LowRankCodec",
    "ResidualVQCodec",
    "Role",
    "TopKCodec",
    "build_codec",
    "check_lowrank",
    "check_rvq",
    "check_topk",
    "default_rvq_groups",
]


@dataclass(frozen=True, kw_only=True)
class CodecEnd:
    """What one end of one direction of one boundary is built from.

    Attributes:
        role: what is carried.
        width: w, numbers a row.
        dtype: of the model.
        seed: of all that is random; the same at both ends, another for each direction.
        settings: those of all codecs.
        shards: how many processes each send a part of the same rows.
        shard: which of them this is, if it sends.
        sender: a number of its own for each process that sends other rows in this direction.
        sends: whether this end encodes or decodes.

    Raises:
        ValueError: there is no such shard.
    """

    role: Role
    width: int
    dtype: torch.dtype
    seed: int
    settings: CodecSettings
    shards: int = 1
    shard: int = 0
    sender: int = 0
    sends: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"shard {self.shard} is not one of {self.shards}")


def _pipeline(end: CodecEnd) -> Codec:
    return DtypeCodec(end.dtype, end.width)


def _scaled(kind: type[ScaledCodec]) -> Callable[[CodecEnd], Codec]:
    def build(end: CodecEnd) -> Codec:
        # Only the sender draws. With one seed all senders would round their rows alike.
        seed = stream_key(end.seed, end.sender)
        return kind(end.role, end.width, end.settings.group_size, seed)

    return build


def _rvq(end: CodecEnd) -> Codec:
    return ResidualVQCodec(
        end.width,
        end.dtype,
        end.settings,
        end.seed,
        shards=end.shards,
        shard=end.shard,
        sends=end.sends,
    )


def _topk(end: CodecEnd) -> Codec:
    return TopKCodec(end.dtype, end.width, check_topk(end.settings, width=end.width))


def _lowrank(end: CodecEnd) -> Codec:
    if end.role is not Role.GRADIENT:
        raise ValueError(LOWRANK_FORWARD)
    return LowRankCodec(end.dtype, end.width, end.settings, end.seed, sends=end.sends)


CODECS: dict[str, Callable[[CodecEnd], Codec]] = {
    "pipeline": _pipeline,
    "fp8": _scaled(Fp8Codec),
    "int8": _scaled(Int8Codec),
    "int4": _scaled(Int4Codec),
    "rvq": _rvq,
    "topk": _topk,
    "lowrank": _lowrank,
}


def build_codec(name: str, end: CodecEnd) -> Codec:
    """One end of one direction of one boundary.

    Args:
        name: a key of `CODECS`.
        end: what it is built from.

    Raises:
        ValueError: the name is unknown, or settings do not fit; names flag, value and remedy.
    """
    if name not in CODECS:
        raise ValueError(f"codec {name} is unknown; use one of {', '.join(CODECS)}")
    return CODECS[name](end)
