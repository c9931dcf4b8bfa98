# SPDX-License-Identifier: Apache-2.0
"""A fixed rotation before another codec, which spreads outliers over their neighbours."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mapl.codecs.base import Codec
from mapl.codecs.casting import copy_clamped
from mapl.codecs.counter_random import hash64, stream_key


class Rotated(Codec):
    """Encodes Q x in place of x, with Q = H D: random signs D, then a Walsh–Hadamard transform H.

    H is orthonormal and symmetric and works on blocks of the largest power of two that divides w;
    an odd w leaves nothing but the signs. A number that is not finite spreads over its block, and
    from there as far as the inner codec carries it. So do finite numbers whose sum over a block
    leaves the range of fp32, for which they must be larger than 2¹²⁸ / √block.

    Args:
        codec: the inner codec, for rows of w fp32 numbers.
        width: w.
        seed: of the signs, the same at both ends.
    """

    signs: Tensor

    def __init__(self, codec: Codec, width: int, seed: int) -> None:
        super().__init__()
        self.codec, self.width = codec, width
        self.block = width & -width
        # ±1 is exact in every dtype that the model may be cast to.
        signs = (hash64(stream_key(seed), width, torch.device("cpu")) >> 63) | 1
        self.register_buffer("signs", signs.float(), persistent=False)

    def parts(self, rows: int) -> dict[str, int]:
        return self.codec.parts(rows)

    @torch.no_grad()
    def encode(self, rows: Tensor, number: int) -> Tensor:
        return self.codec.encode(self._transform(rows.float() * self.signs), number)

    @torch.no_grad()
    def decode(self, bodies: Sequence[Tensor], out: Tensor, number: int) -> None:
        rotated = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        self.codec.decode(bodies, rotated, number)
        copy_clamped(self._transform(rotated) * self.signs, out)

    def _transform(self, rows: Tensor) -> Tensor:
        """H x for each row; its own inverse. Sums of pairs alone, so all devices agree."""
        # Not divided: CUDA divides by a host number otherwise than the CPU.
        x = (rows * (1 / math.sqrt(self.block))).reshape(-1, self.block)
        half = 1
        while half < self.block:
            left, right = x.view(-1, self.block // (2 * half), 2, half).unbind(2)
            x = torch.stack([left + right, left - right], 2).view(-1, self.block)
            half *= 2
        return x.view(rows.shape)
