# SPDX-License-Identifier: Apache-2.0
"""Kernels of mapl.ops.gathered.

Shapes: n rows (tokens), a numbers of the left operand, k of a table's row, m columns of the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.gathered_operands import GatheredOperands
from mapl.ops.kernels import quantise
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

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
    scales,
    codes,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [n, m] = [left | table[ids]]·weight, accumulated in fp32.

    left [n, a] with rows `left_stride` apart, table [V, k], ids [n], weight [a + k, m]. EVEN says
    that a and k are multiples of INNER, and m of COLUMNS.

    With a FORMAT, scales [n, m / GROUP] and codes of what out would be are written in its stead:
    see mapl.ops.kernels.scaled. GROUP is a power of two that divides COLUMNS, and COLUMNS m.
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
    result = total.to(out.dtype.element_ty)
    place = rows[:, None].to(tl.int64) * m + columns[None, :]
    if FORMAT == "":
        tl.store(out + place, result, mask=(rows < n)[:, None] & (columns < m)[None, :])
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(result.to(tl.float32), (ROWS, GROUPS, GROUP))
        bits = quantise.scale_bits(tl.max(quantise.magnitude(grouped), 2), LARGEST)
        first = rows.to(tl.int64) * (m // GROUP) + tl.program_id(0) % column_tiles * GROUPS
        group = first[:, None] + tl.arange(0, GROUPS)[None, :]
        tl.store(scales + group, bits.to(tl.int16), mask=(rows < n)[:, None])
        ratio = quantise.ratio(grouped, quantise.from_bf16_bits(bits)[:, :, None], LARGEST)
        code = quantise.code(ratio, ratio, FORMAT, False)
        if FORMAT == "int4":
            low, high = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
            half = tl.program_id(0) % column_tiles * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            pair = rows[:, None].to(tl.int64) * (m // 2) + half[None, :]
            tl.store(codes + pair, (low | high << 4).to(tl.uint8), mask=(rows < n)[:, None])
        else:
            flat = tl.reshape(code, (ROWS, COLUMNS)).to(tl.uint8)
            tl.store(codes + place, flat, mask=(rows < n)[:, None])


def gathered_mm(operands: GatheredOperands) -> Tensor:
    """See `mapl.ops.gathered.gathered_mm`; left's rows are contiguous."""
    left, weight = operands.left, operands.weight
    out = torch.empty(left.size(0), weight.size(1), dtype=left.dtype, device=left.device)
    _launch(operands, out, None, "", 1)
    return out


def quantises(columns: int, group: int) -> bool:
    """Whether `gathered_mm_quantised` takes results of so many columns and such groups."""
    tile, _ = _tile_columns(columns)
    return columns % tile == 0 and group & (group - 1) == 0 and 2 <= group <= tile


def gathered_mm_quantised(
    operands: GatheredOperands, body: Tensor, group: int, format: str
) -> None:
    """Fills `body`, uint8, with what mapl.ops.kernels.scaled makes of the product, to the nearest.

    The product itself is not written anywhere.

    Args:
        operands: as for `gathered_mm`.
        body: scales, then codes.
        group: numbers that share a scale; see `quantises`.
        format: a key of `quantise.LARGEST`.
    """
    _launch(operands, operands.left, body, format, group)


def _launch(
    operands: GatheredOperands, out: Tensor, body: Tensor | None, format: str, group: int
) -> None:
    left, table, ids, weight = operands
    (n, a), k, m = left.shape, table.size(1), weight.size(1)
    columns, warps = _tile_columns(m)
    grid = (cdiv(n, _TILE_ROWS) * cdiv(m, columns),)
    even = a % _INNER == 0 and k % _INNER == 0 and m % columns == 0
    scales = codes = None
    if body is not None:
        scale_bytes = 2 * n * (m // group)
        scales, codes = body[:scale_bytes].view(torch.int16), body[scale_bytes:]
    launch(
        gathered_mm_kernel,
        grid,
        left, table, ids, weight, out, n, a, k, m, left.stride(0), scales, codes,
        EVEN=even, ROWS=_TILE_ROWS, COLUMNS=columns, INNER=_INNER,
        FORMAT=format, LARGEST=quantise.LARGEST.get(format, 0.0), GROUP=group,
        num_warps=warps, num_stages=4,
    )  # fmt: skip


def _tile_columns(m: int) -> tuple[int, int]:
    """Columns of a tile, as many as the result has up to 256, and warps for it."""
    columns = min(256, max(16, next_power_of_2(m)))
    return columns, 8 if columns > 64 else 4


_POINTERS = {"left": "*bf16", "table": "*bf16", "ids": "*i64", "out": "*bf16"}
_SIZES = {"a": "i32", "k": "i32", "left_stride": "i32"}
_MM = {**_POINTERS, "weight": "*bf16", **_SIZES, "n": "i32", "m": "i32"}
_CODES = {"scales": "*i16", "codes": "*u8"}


def _specialisation(format: str, columns: int, even: bool) -> Specialisation:
    constants: dict[str, Any] = {
        "EVEN": even,
        "ROWS": _TILE_ROWS,
        "COLUMNS": columns,
        "INNER": _INNER,
    }
    constants |= {"FORMAT": format, "LARGEST": quantise.LARGEST.get(format, 0.0)}
    if not format:
        constants |= {"GROUP": 1, "scales": None, "codes": None}
    options = {"num_warps": 8, "num_stages": 4}
    types = {**_MM, **_CODES} if format else _MM
    return Specialisation(
        gathered_mm_kernel, types, {"GROUP": 64, **constants}, options, tuple(types)
    )


SPECIALISATIONS = [
    *(
        _specialisation("", columns, even)
        for even, columns in ((True, 256), (True, 128), (False, 256))
    ),
    *(
        _specialisation(format, columns, True)
        for format in ("e4m3", "int8", "int4")
        for columns in (128, 256)
    ),
]
