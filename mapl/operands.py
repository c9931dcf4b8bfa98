# SPDX-License-Identifier: Apache-2.0
"""What a boundary's GEMMs over tokens multiply by: formed once for each value of A, then kept.

    encode:  [A ; −P A]  [d + k, r]              decode:  [Aᵀ ; P]  [r + k, d]

A [d, r] changes once a step, and a step has many micro-batches. Without a basis P, these are A and
Aᵀ alone. P A is formed in fp32 before it is rounded to the model's dtype.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mapl.fp32 import full_precision

Direction = Literal["encode", "decode"]


@dataclass(frozen=True, eq=False)
class _State:
    """What an operand was formed of."""

    a: Tensor
    a_version: int
    basis: Tensor | None
    basis_version: int

    def is_still(self, now: "_State") -> bool:
        same = self.a is now.a and self.basis is now.basis
        return same and (self.a_version, self.basis_version) == (now.a_version, now.basis_version)


class Operands:
    """Those of one projector."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Direction, torch.dtype], tuple[_State, Tensor]] = {}

    def get(
        self, direction: Direction, a: Tensor, basis: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The operand for A and P as they are now.

        In-place changes, such as a step or a load, count up a tensor's version and are seen. What
        goes by `Tensor.data` or a collective is not: `clear` after those.

        Args:
            direction: which of the two.
            a: A [d, r].
            basis: P [k, d], or None.
            dtype: of the operand.
        """
        state = _State(a, a._version, basis, 0 if basis is None else basis._version)
        kept = self._kept.get((direction, dtype))
        if kept is None or not kept[0].is_still(state):
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
