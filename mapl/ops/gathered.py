# SPDX-License-Identifier: Apache-2.0
"""GEMMs over tokens whose left operand is in part gathered from a table, row by row.

Both directions of a boundary are one of these (mapl.boundary):

    Z = [X | E[ids]]·[A ; −P A]              X̂ = [Ẑ | E[ids]]·[Aᵀ ; P]

Shapes: n tokens, a numbers a token of the left operand, table [V, k], m columns of the result.
"""

import torch
from torch import Tensor

from mapl.ops.dispatch import runs_gemms, use_triton
from mapl.ops.gathered_operands import GatheredOperands

#: Up to this many columns each row of the left operand is loaded once or twice, and a kernel that
#: gathers while it loads is the fastest. Above, cuBLAS is faster on operands put side by side.
KERNEL_COLUMNS = 512


def gathered_mm(operands: GatheredOperands) -> Tensor:
    """[left | table[ids]]·weight, accumulated in fp32.

    Returns:
        [n, m], contiguous, of left's dtype.
    """
    operands = operands.row_contiguous()
    left, table, ids, weight = operands
    if not has_kernels(left):
        return reference_gathered_mm(operands)
    if weight.size(1) > KERNEL_COLUMNS:
        from mapl.ops.kernels.side_by_side import side_by_side

        return torch.mm(side_by_side(left, table, ids), weight)
    if runs_gemms(left):
        from mapl.ops.kernels import gathered

        return gathered.gathered_mm(operands)
    return reference_gathered_mm(operands)


def reference_gathered_mm(operands: GatheredOperands) -> Tensor:
    """The same in plain torch, without a copy of a left operand wider than the result."""
    left, table, ids, weight = operands
    if left.size(1) < weight.size(1):
        return torch.mm(reference_side_by_side(left, table, ids), weight)
    over_left, over_table = weight.split([left.size(1), table.size(1)])
    return torch.mm(left, over_left).addmm_(table[ids.long()], over_table)


def reference_side_by_side(left: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """[left | table[ids]], [n, a + k]."""
    return torch.cat([left, table[ids.long()]], dim=1)


def has_kernels(left: Tensor) -> bool:
    """16-bit numbers have; fp32 ones heed torch's own setting of matmul precision instead."""
    return left.dtype.itemsize == 2 and use_triton(left)
