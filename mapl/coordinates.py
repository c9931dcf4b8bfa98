# SPDX-License-Identifier: Apache-2.0
"""Anchor coordinates C = table[ids] of a micro-batch's tokens, gathered where they are used.

The gradient of the table is summed over equal ids the same way every time (mapl.ops.scatter). If
the table has a `main_grad`, as parameters have under Megatron's DDP, it is added right there, in
that buffer's dtype: the dense gradient, V rows for the few that a micro-batch has tokens of, is
then neither formed nor added.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mapl.ops.scatter import TokenOrder, scatter_add


class Coordinates:
    """Those of one micro-batch at one stage, whose decoder and encoder share them.

    Args:
        table: [V, k].
        ids: integers of any shape.
        sorts: whether a gradient of the table will need the tokens in the order of their ids.

    Attributes:
        table: as given.
        shape: that of C.
        ids: int32 or int64 [n], flat and contiguous.

    Raises:
        ValueError: ids that are not integers.
    """

    def __init__(self, table: Tensor, ids: Tensor, *, sorts: bool = True) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"token ids must be integers, got {ids.dtype}")
        self.table, self.shape = table, (*ids.shape, table.size(1))
        flat = ids.flatten().contiguous()  # kernels read them one after the other
        self.ids = flat if flat.dtype in (torch.int32, torch.int64) else flat.long()
        self._order = TokenOrder(self.ids)
        self._adds: bool | None = None  # of the first use
        self._waiting: Tensor | None = None  # the dC of another use, which comes with the last
        if sorts and table.requires_grad and torch.is_grad_enabled():
            self._order.start()

    @classmethod
    def of(cls, c: Tensor) -> "Coordinates":
        """Coordinates that were gathered before, [..., k]."""
        ids = torch.arange(c.numel() // c.size(-1), device=c.device)
        return cls(c.reshape(-1, c.size(-1)), ids.view(c.shape[:-1]))

    @property
    def adds_to_main_grad(self) -> bool:
        """Whether the table's gradient goes to its `main_grad`."""
        return getattr(self.table, "main_grad", None) is not None

    def gathered(self) -> Tensor:
        """C in its shape; autograd takes its gradient back to the table.

        Raises:
            RuntimeError: the gradient of the table goes to `main_grad`; autograd's would be lost.
        """
        if self.adds_to_main_grad and torch.is_grad_enabled():
            raise RuntimeError("this table's gradient goes to main_grad; take `rows` instead")
        return F.embedding(self.ids, self.table).view(self.shape)

    def rows(self, table: Tensor | None = None) -> Tensor:
        """C as a matrix [n, k], of the table or of a cast of it; no gradient."""
        return torch.embedding((self.table if table is None else table).detach(), self.ids)

    def begin_use(self, *, adds: bool) -> bool:
        """Whether this is the first use that a backward pass will come to, and so its last.

        The backward pass of the first must come: the gradients of later uses wait for it.

        Args:
            adds: as for `table_gradient`.

        Raises:
            RuntimeError: `adds` is not that of the first use; one of both gradients would be lost.
        """
        if not (self.table.requires_grad and torch.is_grad_enabled()):
            return False
        first = self._adds is None
        if self._adds not in (None, adds):
            raise RuntimeError(
                "a micro-batch is decoded and encoded in different dtypes, one of which is not the "
                "anchor table's; a gradient would be lost: use one dtype for both"
            )
        self._adds = adds
        return first

    def table_gradient(self, table: Tensor, dc: Tensor, *, adds: bool, last: bool) -> Tensor | None:
        """What an autograd Function returns for the table.

        Args:
            table: the table, or a cast of it, as the Function got it.
            dc: gradient of C, [n, k].
            adds: `adds_to_main_grad` in the forward pass, for the table itself.
            last: whether no other use of these coordinates comes later in this backward pass.

        Returns:
            The dense gradient [V, k]. If it goes to `main_grad` instead, None until the last time.
            Then the gradients of two uses are added in one pass, and a tensor without meaning
            comes back, since whoever owns the buffer waits for one.
        """
        if not adds:
            gradient = torch.zeros_like(table)
            scatter_add(gradient, self._order, dc)
            return gradient
        waiting, self._waiting = self._waiting, None
        if waiting is None and not last:
            self._waiting = dc
            return None
        scatter_add(self.table.main_grad, self._order, dc, waiting)  # type: ignore[attr-defined]
        self.table.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return _meaningless(table.shape, table.dtype, table.device) if last else None


def _meaningless(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gradient that nobody reads; all of one shape share their memory."""
    return _shared_memory(shape, dtype, device).detach()


@cache
def _shared_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
