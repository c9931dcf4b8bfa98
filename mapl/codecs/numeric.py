# SPDX-License-Identifier: Apache-2.0
"""Codecs that send each number by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DtypeCodec:
    """Sends the numbers as they are, in one dtype: lossless for tensors of that dtype."""

    dtype: torch.dtype

    def body_bytes(self, shape: Sequence[int]) -> int:
        """Numbers times the bytes of one."""
        return math.prod(shape) * self.dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's memory as uint8.

        Raises:
            ValueError: the tensor has another dtype, so that sending it would round.
        """
        if tensor.dtype != self.dtype:
            raise ValueError(f"a tensor of {tensor.dtype} was given to a codec for {self.dtype}")
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    def decode(self, body: torch.Tensor, out: torch.Tensor) -> None:
        """Copies the numbers into `out`."""
        out.detach().copy_(body.view(self.dtype).view(out.shape))
