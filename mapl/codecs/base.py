# SPDX-License-Identifier: Apache-2.0
"""What a wire codec is: three verbs, no state that the wire does not show."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Codec(Protocol):
    """Turns a tensor into bytes and back. Plain functions: autograd ends at a boundary anyway."""

    def body_bytes(self, shape: Sequence[int]) -> int:
        """How many bytes a tensor of this shape takes; known to both sides."""

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of `tensor`: uint8 [body_bytes(tensor.shape)]."""

    def decode(self, body: torch.Tensor, out: torch.Tensor) -> None:
        """Fills `out` with what `body` (uint8) says."""
