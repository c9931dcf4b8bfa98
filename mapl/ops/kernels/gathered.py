# SPDX-License-Identifier: Apache-2.0
"""Kernels of mapl.ops.gathered.

Shapes: n rows (tokens), a numbers of the left operand, k of a table's row, m columns of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation

_INNER = 64  # numbers of the contracted dimension in one step of the GEMM
_TILE_ROWS = 128


@triton.jit
def gathered_mm_kernel(
    left,
    table,
    ids,
    weight,
    out,
    n,
    a,
    k,
    m,
    left_stride,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out [n, m] = [left | table[ids]]·weight, accumulated in fp32.

    left [n, a] with rows `left_stride` apart, table [V, k], ids [n], weight [a + k, m]. EVEN says
    that a and k are multiples of INNER, and m of COLUMNS.
    """
    column_tiles = tl.cdiv(m, COLUMNS)
    rows = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    # Rows beyond the last read the last one again: cheaper than a mask, and never stored.
    safe = tl.minimum(rows, n - 1)
    left_rows = left + safe.to(tl.int64) * left_stride
    table_rows = table + tl.load(ids + safe).to(tl.int64) * k
    left_blocks = tl.cdiv(a, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(left_blocks + tl.cdiv(k, INNER)):
        gathered = block >= left_blocks
        start = tl.where(gathered, block - left_blocks, block) * INNER
        pointers = tl.where(gathered, table_rows, left_rows)[:, None] + (start + inner)[None, :]
        weight_rows = tl.where(gathered, a, 0) + start + inner
        weights = weight + weight_rows[:, None].to(tl.int64) * m + columns[None, :]
        if EVEN:
            x = tl.load(pointers)
            w = tl.load(weights)
        else:
            inside = start + inner < tl.where(gathered, k, a)
            x = tl.load(pointers, mask=inside[None, :], other=0.0)
            w = tl.load(weights, mask=inside[:, None] & (columns < m)[None, :], other=0.0)
        total = tl.dot(x, w, total)
    target = out + rows[:, None].to(tl.int64) * m + columns[None, :]
    stored = (rows < n)[:, None] & (columns < m)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def side_by_side_kernel(left, table, ids, out, a, k, left_stride, BLOCK: tl.constexpr):
    """out [n, a + k] = [left | table[ids]], one row a program."""
    row = tl.program_id(0).to(tl.int64)
    width = a + k
    table_row = table + tl.load(ids + row).to(tl.int64) * k
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        source = tl.where(column < a, left + row * left_stride + column, table_row + (column - a))
        inside = column < width
        tl.store(out + row * width + column, tl.load(source, mask=inside), mask=inside)


def gathered_mm(left: Tensor, table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See `mapl.ops.gathered.gathered_mm`."""
    (n, a), k, m = left.shape, table.size(1), weight.size(1)
    out = torch.empty(n, m, dtype=left.dtype, device=left.device)
    columns, warps = _tile_columns(m)
    grid = (triton.cdiv(n, _TILE_ROWS) * triton.cdiv(m, columns),)
    even = a % _INNER == 0 and k % _INNER == 0 and m % columns == 0
    gathered_mm_kernel[grid](
        left, table, ids, weight, out, n, a, k, m, left.stride(0),
        EVEN=even, ROWS=_TILE_ROWS, COLUMNS=columns, INNER=_INNER,
        num_warps=warps, num_stages=4,
    )  # fmt: skip
    return out


def _tile_columns(m: int) -> tuple[int, int]:
    """Columns of a tile, as many as the result has up to 256, and warps for it."""
    columns = min(256, max(16, triton.next_power_of_2(m)))
    return columns, 8 if columns > 64 else 4


def side_by_side(left: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """See `mapl.ops.gathered.reference_side_by_side`."""
    (n, a), k = left.shape, table.size(1)
    out = torch.empty(n, a + k, dtype=left.dtype, device=left.device)
    block, warps = (1024, 4) if a + k >= 1024 else (512, 2)
    side_by_side_kernel[(n,)](
        left, table, ids, out, a, k, left.stride(0), BLOCK=block, num_warps=warps
    )
    return out


_POINTERS = {"left": "*bf16", "table": "*bf16", "ids": "*i64", "out": "*bf16"}
_SIZES = {"a": "i32", "k": "i32", "left_stride": "i32"}
_MM = {**_POINTERS, "weight": "*bf16", **_SIZES, "n": "i32", "m": "i32"}
SPECIALISATIONS = [
    Specialisation(
        gathered_mm_kernel,
        _MM,
        {"EVEN": even, "ROWS": _TILE_ROWS, "COLUMNS": columns, "INNER": _INNER},
        {"num_warps": 8, "num_stages": 4},
        tuple(_MM),
    )
    for even, columns in ((True, 256), (True, 128), (False, 256))
] + [
    Specialisation(
        side_by_side_kernel,
        {**_POINTERS, **_SIZES},
        {"BLOCK": 1024},
        {"num_warps": 4},
        (*_POINTERS, *_SIZES),
    )
]
