# SPDX-License-Identifier: Apache-2.0
"""What mapl.ops.gathered and its kernels multiply."""

from typing import NamedTuple

from torch import Tensor


class GatheredOperands(NamedTuple):
    """The operands of [left | table[ids]]·weight.

    Attributes:
        left: [n, a].
        table: [V, k], contiguous, of left's dtype.
        ids: [n] integers in 0 … V − 1; not checked.
        weight: [a + k, m], contiguous, of left's dtype.
    """

    left: Tensor
    table: Tensor
    ids: Tensor
    weight: Tensor

    def row_contiguous(self) -> "GatheredOperands":
        """The same with `row_contiguous` of left."""
        left = row_contiguous(self.left)
        return self if left is self.left else self._replace(left=left)


def row_contiguous(matrix: Tensor) -> Tensor:
    """The matrix, copied if the numbers of a row do not follow each other in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
