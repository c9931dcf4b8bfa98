# SPDX-License-Identifier: Apache-2.0
"""What a boundary's GEMMs over tokens multiply by: formed once for each value of A, then kept.

    encode:  [A ; −P A]  [d + k, r]              decode:  [Aᵀ ; P]  [r + k, d]

A [d, r] changes once a step, and a step has many micro-batches. Without a basis P, these are A and
Aᵀ alone. P A is formed in fp32 before it is rounded to the model's dtype.
"""

from typing import Literal

import torch
from torch import Tensor

from mapl.fp32 import full_precision

Direction = Literal["encode", "decode"]


class Operands:
    """Those of one projector."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Direction, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}

    def get(
        self, direction: Direction, a: Tensor, basis: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The operand for A and P as they are now.

        Args:
            direction: which of the two.
            a: A [d, r].
            basis: P [k, d], or None.
            dtype: of the operand.
        """
        # In-place changes, such as a step or a load, count up a tensor's version.
        state: tuple[int, ...] = (a.data_ptr(), a._version)
        if basis is not None:
            state = (*state, basis.data_ptr(), basis._version)
        kept = self._kept.get((direction, dtype))
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = (state, _form(direction, a.detach(), basis, dtype))
            self._kept[direction, dtype] = kept
        return kept[1]

    def clear(self) -> None:
        """Forgets them: A may have changed in a way that does not count up its version."""
        self._kept.clear()


def _form(direction: Direction, a: Tensor, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    if direction == "decode":
        up = a.to(dtype).mT.contiguous()
        return up if basis is None else torch.cat([up, basis.to(dtype)])
    down = a.to(dtype)
    if basis is None:
        return down
    with full_precision(a.device):
        basis_down = basis.to(a.dtype) @ a
    return torch.cat([down, basis_down.neg_().to(dtype)])
