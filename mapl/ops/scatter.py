# SPDX-License-Identifier: Apache-2.0
"""Adding the gradients of a micro-batch's tokens to the rows of a table, the same way every time.

Float atomics would add in another order in each run; tensor-parallel ranks that hold the same table
would drift apart. So rows are added in the order of their ids, and within an id in that of their
places in the micro-batch.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mapl.ops.dispatch import use_triton


@dataclass(frozen=True)
class TokenOrder:
    """Token ids, and the same in ascending order once somebody asks for it.

    Attributes:
        ids: [n] integers.
    """

    ids: Tensor

    @cached_property
    def ascending(self) -> tuple[Tensor, Tensor]:
        """The sorted ids, int32 [n], and where each stood, int64 [n]; equal ids in order."""
        ids, places = torch.sort(self.ids.to(torch.int32), stable=True)
        return ids, places


@torch.no_grad()
def scatter_add(total: Tensor, order: TokenOrder, rows: Tensor) -> None:
    """total[ids[i]] += rows[i] for each i, in fp32, deterministically.

    Args:
        total: [V, k], contiguous, changed in place. A narrower dtype is rounded once a row.
        order: of the ids, n of them, all in 0 … V − 1; not checked.
        rows: [n, k], the numbers of a row contiguous.
    """
    if use_triton(rows):
        from mapl.ops.kernels.scatter import scatter_add as kernel

        kernel(total, *order.ascending, rows)
    else:
        reference_scatter_add(total, order.ids, rows)


def reference_scatter_add(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """The same in plain torch; deterministic on a CPU alone."""
    if total.dtype == torch.promote_types(total.dtype, torch.float32):
        total.index_add_(0, ids.long(), rows.to(total.dtype))
        return
    wide = torch.zeros(total.shape, dtype=torch.float32, device=total.device)
    wide.index_add_(0, ids.long(), rows.float())
    total.copy_(total.float() + wide)
