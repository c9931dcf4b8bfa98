# SPDX-License-Identifier: Apache-2.0
"""Adding the gradients of a micro-batch's tokens to the rows of a table, the same way every time.

Float atomics would add in another order in each run; tensor-parallel ranks that hold the same table
would drift apart. So rows are added in the order of their ids, and within an id in that of their
places in the micro-batch.
"""

from functools import cache

import torch
from torch import Tensor

from mapl.ops.dispatch import use_triton
from mapl.ops.gathered_operands import row_contiguous

#: So many ids are sorted by a kernel that compares each with every other; more are by torch.
_FEW = 8192


class TokenOrder:
    """Token ids, and the same in ascending order once somebody asks for it.

    Args:
        ids: [n] integers.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._sorted: tuple[Tensor, Tensor] | None = None
        self._ready: torch.cuda.Event | None = None

    def start(self) -> None:
        """Sorts many ids beside what the GPU does next: that takes long, but little of the GPU."""
        if self.ids.numel() <= _FEW or self._sorted is not None:
            return
        if not (self.ids.is_cuda and use_triton(self.ids)):
            return
        stream = _side_stream(self.ids.device)
        stream.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(stream):
            self._sorted = self._sort()
            self._ready = stream.record_event()
        self.ids.record_stream(stream)

    @property
    def ascending(self) -> tuple[Tensor, Tensor]:
        """The sorted ids, int32 [n], and where each stood, [n] integers; equal ids in order.

        Few ids are sorted on the stream of the first who asks; others must ask on the same.
        """
        if self._sorted is None:
            self._sorted = self._sort()
        if self._ready is not None:
            stream = torch.cuda.current_stream(self.ids.device)
            stream.wait_event(self._ready)
            for made_elsewhere in self._sorted:
                made_elsewhere.record_stream(stream)
        return self._sorted

    def _sort(self) -> tuple[Tensor, Tensor]:
        if self.ids.numel() <= _FEW and use_triton(self.ids):
            from mapl.ops.kernels.scatter import ascending

            return ascending(self.ids)
        ids, places = torch.sort(self.ids.to(torch.int32), stable=True)
        return ids, places


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def scatter_add(total: Tensor, order: TokenOrder, rows: Tensor, more: Tensor | None = None) -> None:
    """total[ids[i]] += rows[i] + more[i] for each i, in fp32.

    As kernels and on a CPU deterministic.

    Kernels sum in an order that all ids of the micro-batch decide. A number that is not finite may
    spread to the rows of other ids of the micro-batch.

    Args:
        total: [V, k], contiguous, changed in place. A narrower dtype is rounded once a row.
        order: of the ids, n of them, all in 0 … V − 1; not checked.
        rows: [n, k].
        more: [n, k], or None for zeros. Both at once cost little more than one: most of the time
            goes into the rows of `total`.
    """
    if use_triton(rows):
        from mapl.ops.kernels.scatter import scatter_add as kernel

        more = None if more is None else row_contiguous(more)
        kernel(total, *order.ascending, row_contiguous(rows), more)
    else:
        reference_scatter_add(total, order.ids, rows, more)


@torch.no_grad()
def reference_scatter_add(
    total: Tensor, ids: Tensor, rows: Tensor, more: Tensor | None = None
) -> None:
    """The same in plain torch; deterministic on a CPU alone."""
    if more is not None:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) + more
    if total.dtype == torch.promote_types(total.dtype, torch.float32):
        total.index_add_(0, ids.long(), rows.to(total.dtype))
        return
    wide = torch.zeros(total.shape, dtype=torch.float32, device=total.device)
    wide.index_add_(0, ids.long(), rows.float())
    total.copy_(total.float() + wide)
