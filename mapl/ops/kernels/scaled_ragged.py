# SPDX-License-Identifier: Apache-2.0
"""mapl.codecs.scaled for any width and any group, still one kernel each way.

The codes of all rows follow each other, so a byte of int4 may hold the last number of one row and
the first of the next, beside different scales. A program takes an even number of rows: its codes
then start and end with a byte. It first finds the scales of its rows, then reads them back.

Shapes: n rows of w numbers, G groups a row of g numbers, the last one perhaps shorter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.kernels import quantise
from mapl.ops.kernels.quantise import LARGEST
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

#: Numbers that a program holds at once.
_TILE = 1024
_ROWS = 4


def encode(
    rows: Tensor,
    scales: Tensor,
    codes: Tensor,
    group: int,
    format: str,
    stochastic: bool,
    key: int,
) -> None:
    """See scaled.encode: `rows` [n, w] contiguous, `scales` int16 [n G], `codes` uint8."""
    padded = next_power_of_2(group)
    launch(
        _encode_ragged,
        (cdiv(rows.size(0), _ROWS),),
        rows,
        scales,
        codes,
        rows.size(0),
        key,
        WIDTH=rows.shape[1],
        GROUP=group,
        GROUPS=cdiv(rows.shape[1], group),
        PADDED=padded,
        FORMAT=format,
        LARGEST=LARGEST[format],
        STOCHASTIC=stochastic,
        ROWS=_ROWS,
        BLOCK=max(1, _TILE // padded),
        TILE=_TILE,
    )


def decode(scales: Tensor, codes: Tensor, out: Tensor, group: int, format: str) -> None:
    """See scaled.decode: `scales` int16 [n G], `codes` uint8, `out` [n, w] contiguous."""
    launch(
        _decode_ragged,
        (cdiv(out.numel(), _TILE),),
        scales,
        codes,
        out,
        out.numel(),
        WIDTH=out.shape[1],
        GROUP=group,
        GROUPS=cdiv(out.shape[1], group),
        FORMAT=format,
        LIMIT=torch.finfo(out.dtype).max,
        BLOCK=_TILE,
    )


@triton.jit
def _scale_place(place, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Which scale belongs to a place in the rows."""
    row = place // WIDTH
    return row * GROUPS + (place - row * WIDTH) // GROUP


@triton.jit(do_not_specialize=["count", "key"])
def _encode_ragged(
    rows,
    scales,
    codes,
    count,
    key,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, count)
    offset = tl.arange(0, PADDED)[None, :]
    for start in range(0, ROWS * GROUPS, BLOCK):
        group = first * GROUPS + start + tl.arange(0, BLOCK)
        inside = group < last * GROUPS
        row = group // GROUPS
        column = ((group - row * GROUPS) * GROUP)[:, None] + offset
        filled = inside[:, None] & (offset < GROUP) & (column < WIDTH)
        x = tl.load(rows + row[:, None] * WIDTH + column, mask=filled, other=0.0).to(tl.float32)
        bits = quantise.scale_bits(tl.max(quantise.magnitude(x), 1), LARGEST)
        tl.store(scales + group, bits.to(tl.int16), mask=inside)
    tl.debug_barrier()  # other threads of the program read these scales
    HALF: tl.constexpr = TILE // 2
    end = last * WIDTH
    for start in range(0, ROWS * WIDTH, TILE):
        place = first * WIDTH + start + tl.arange(0, TILE)
        pair = first * WIDTH // 2 + start // 2 + tl.arange(0, HALF)
        inside = place < end
        x = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
        where = _scale_place(place, WIDTH, GROUP, GROUPS)
        bits = tl.load(scales + where, mask=inside, other=0x3F80).to(tl.int32)
        ratio = quantise.ratio(x, quantise.from_bf16_bits(bits), LARGEST)
        even, odd = tl.split(tl.reshape(ratio, [HALF, 2]))
        low, high = quantise.code_pairs(even, odd, pair, key, FORMAT, STOCHASTIC)
        if FORMAT == "int4":
            high = tl.where(2 * pair + 1 < end, high, 0)
            tl.store(codes + pair, (low | high << 4).to(tl.uint8), mask=2 * pair < end)
        else:
            joined = tl.reshape(tl.join(low, high), [TILE])
            tl.store(codes + place, joined.to(tl.uint8), mask=inside)


@triton.jit
def _decode_ragged(
    scales,
    codes,
    out,
    count,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    if FORMAT == "int4":
        both = tl.load(codes + place // 2, mask=inside, other=0).to(tl.int32)
        code = (both >> (4 * (place & 1)).to(tl.int32)) & 15
    else:
        code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    where = _scale_place(place, WIDTH, GROUP, GROUPS)
    bits = tl.load(scales + where, mask=inside, other=0).to(tl.int32)
    x = quantise.clamped(quantise.value(code, FORMAT) * quantise.from_bf16_bits(bits), LIMIT)
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


_SIZES = {"WIDTH": 65, "GROUP": 64, "GROUPS": 2}
_TYPES = {"scales": "*i16", "codes": "*u8", "count": "i32"}

SPECIALISATIONS = [
    Specialisation(
        _encode_ragged,
        {**_TYPES, "rows": "*bf16", "key": "i64"},
        {
            **_SIZES,
            "PADDED": 64,
            "FORMAT": "int4",
            "LARGEST": 7.0,
            "STOCHASTIC": True,
            "ROWS": _ROWS,
            "BLOCK": _TILE // 64,
            "TILE": _TILE,
        },
        divisible=("rows", "scales"),
    ),
    Specialisation(
        _decode_ragged,
        {**_TYPES, "out": "*bf16"},
        {**_SIZES, "FORMAT": "int4", "LIMIT": torch.finfo(torch.bfloat16).max, "BLOCK": _TILE},
        divisible=("scales", "out"),
    ),
]
