# SPDX-License-Identifier: Apache-2.0
"""Anchor coordinates that are sums of rows of several tables: C = table₁[ids₁] + table₂[ids₂] + …

C is formed once a micro-batch, n·k numbers that decoder and encoder share, and stands for a table
of its own from there on. Its gradient goes to each table as that of single rows does
(`Coordinates.table_gradient`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mapl.coordinates import Coordinates


class SummedCoordinates(Coordinates):
    """The sum of what `terms` stand for.

    Args:
        terms: at least one; of one shape and dtype, each used nowhere else.

    Attributes:
        table: C [n, k]; in autograd, the way to the gradients of the terms' tables.
        ids: 0 … n − 1.

    Raises:
        ValueError: terms that do not fit each other.
    """

    def __init__(self, terms: Sequence[Coordinates]) -> None:
        first = terms[0]
        for term in terms:
            if term.shape != first.shape or term.table.dtype != first.table.dtype:
                raise ValueError(
                    "coordinates that are added must have one shape and dtype, got "
                    f"{tuple(term.shape)} {term.table.dtype} beside {tuple(first.shape)} "
                    f"{first.table.dtype}"
                )
        summed: Tensor = _SumRows.apply(tuple(terms), *(term.table for term in terms))
        rows = torch.arange(len(summed), dtype=torch.int32, device=summed.device)
        super().__init__(summed, rows.view(first.shape[:-1]), sorts=False)

    def table_gradient(self, table: Tensor, dc: Tensor, *, adds: bool, last: bool) -> Tensor:
        """dC itself: each row of C belongs to one token. Autograd adds those of several uses."""
        return dc


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: tuple[Coordinates, ...], *tables: Tensor) -> Tensor:
        ctx.terms = terms
        ctx.adds = [term.adds_to_main_grad for term in terms]
        ctx.save_for_backward(*tables)
        rows = terms[0].rows()
        for term in terms[1:]:
            rows += term.rows()
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        places = zip(ctx.terms, ctx.saved_tensors, ctx.adds, strict=True)
        gradients = [
            term.table_gradient(table, dc, adds=adds, last=True) for term, table, adds in places
        ]
        return None, *gradients
