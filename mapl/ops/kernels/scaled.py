# SPDX-License-Identifier: Apache-2.0
"""mapl.codecs.scaled in one kernel each way, for rows that are cut into whole groups.

Where a group is a power of two and divides the row, rows do not matter: groups follow each other in
memory, and so do their scales and codes. Everything else goes through scaled_ragged.py.

Shapes: n rows of w numbers, g of them a group; m = n w / g groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.kernels import quantise, scaled_ragged
from mapl.ops.kernels.quantise import LARGEST
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv

#: Numbers that a program takes.
_TILE = 2048


def encode(rows: Tensor, out: Tensor, group: int, format: str, stochastic: bool, key: int) -> None:
    """Writes scales and codes of `rows` [n, w] into `out`, uint8, as `ScaledCodec.encode` does.

    Args:
        group: g ≤ w.
        format: a key of `quantise.LARGEST`.
        stochastic: whether integers are rounded at random.
        key: of the random numbers, an int64.
    """
    if not rows.numel():
        return
    rows = rows.detach().contiguous()
    width = rows.shape[1]
    count = rows.size(0) * -(-width // group)
    scales, codes = out[: 2 * count].view(torch.int16), out[2 * count :]
    if not _whole(width, group):
        scaled_ragged.encode(rows, scales, codes, group, format, stochastic, key)
        return
    block = max(1, _TILE // group)
    launch(
        _encode_groups,
        (cdiv(count, block),),
        rows,
        scales,
        codes,
        count,
        key,
        GROUP=group,
        FORMAT=format,
        LARGEST=LARGEST[format],
        STOCHASTIC=stochastic,
        BLOCK=block,
    )


def decode(body: Tensor, out: Tensor, group: int, format: str) -> None:
    """Fills the contiguous `out` [n, w] from one body, as `ScaledCodec.decode_rows` does."""
    if not out.numel():
        return
    out = out.detach()
    width = out.shape[1]
    count = out.size(0) * -(-width // group)
    scales, codes = body[: 2 * count].view(torch.int16), body[2 * count :]
    if not _whole(width, group):
        scaled_ragged.decode(scales, codes, out, group, format)
        return
    block = max(1, _TILE // group)
    launch(
        _decode_groups,
        (cdiv(count, block),),
        scales,
        codes,
        out,
        count,
        GROUP=group,
        FORMAT=format,
        LIMIT=torch.finfo(out.dtype).max,
        BLOCK=block,
    )


def _whole(width: int, group: int) -> bool:
    return width % group == 0 and group & (group - 1) == 0 and 2 <= group <= _TILE


@triton.jit(do_not_specialize=["key"])
def _encode_groups(
    rows,
    scales,
    codes,
    count,
    key,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(rows + place, mask=inside[:, None], other=0.0).to(tl.float32)
    bits = quantise.scale_bits(tl.max(quantise.magnitude(x), 1), LARGEST)
    tl.store(scales + group, bits.to(tl.int16), mask=inside)
    ratio = quantise.ratio(x, quantise.from_bf16_bits(bits)[:, None], LARGEST)
    even, odd = tl.split(tl.reshape(ratio, [BLOCK, HALF, 2]))
    pair = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    low, high = quantise.code_pairs(even, odd, pair, key, FORMAT, STOCHASTIC)
    if FORMAT == "int4":
        tl.store(codes + pair, (low | high << 4).to(tl.uint8), mask=inside[:, None])
    else:
        joined = tl.reshape(tl.join(low, high), [BLOCK, GROUP])
        tl.store(codes + place, joined.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _decode_groups(
    scales,
    codes,
    out,
    count,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if FORMAT == "int4":
        pair = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        both = tl.load(codes + pair, mask=inside[:, None], other=0).to(tl.int32)
        code = tl.reshape(tl.join(both & 15, both >> 4), [BLOCK, GROUP])
    else:
        code = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.int32)
    bits = tl.load(scales + group, mask=inside, other=0).to(tl.int32)
    x = quantise.value(code, FORMAT) * quantise.from_bf16_bits(bits)[:, None]
    x = quantise.clamped(x, LIMIT)
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside[:, None])


_POINTERS = {"scales": "*i16", "codes": "*u8"}
_CONSTANTS = {"GROUP": 64, "BLOCK": _TILE // 64}

SPECIALISATIONS = [
    Specialisation(
        _encode_groups,
        {"rows": "*bf16", **_POINTERS, "count": "i32", "key": "i64"},
        {**_CONSTANTS, "FORMAT": name, "LARGEST": LARGEST[name], "STOCHASTIC": stochastic},
        divisible=("rows", *_POINTERS, "count"),
    )
    for name, stochastic in [
        ("e4m3", False),
        ("e5m2", False),
        ("int8", False),
        ("int8", True),
        ("int4", False),
        ("int4", True),
    ]
] + [
    Specialisation(
        _decode_groups,
        {**_POINTERS, "out": "*bf16", "count": "i32"},
        {**_CONSTANTS, "FORMAT": name, "LIMIT": torch.finfo(torch.bfloat16).max},
        divisible=("out", *_POINTERS, "count"),
    )
    for name in LARGEST
]
