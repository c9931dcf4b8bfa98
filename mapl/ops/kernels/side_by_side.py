# SPDX-License-Identifier: Apache-2.0
"""[Ẑ | E[ids]] in one pass, out of Ẑ itself or straight from the codes that stand for it.

cuBLAS multiplies what is written here faster than a kernel that gathers while it multiplies could
(see the notes in docs). Ẑ decoded from codes is written a second time, on its own: dA needs it.

Shapes: n rows (tokens), r numbers of Ẑ, k of a table's row. One row a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.kernels import quantise
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2


@triton.jit
def _gather(table, ids, row, out_row, k, BLOCK: tl.constexpr):
    """Copies the table's row of a token."""
    source = table + tl.load(ids + row).to(tl.int64) * k
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out_row + column, tl.load(source + column, mask=column < k), mask=column < k)


@triton.jit
def _keep(x, z_row, out_row, column, r, LIMIT: tl.constexpr):
    """Writes decoded numbers of a row to both places."""
    x = quantise.clamped(x, LIMIT).to(z_row.dtype.element_ty)
    tl.store(z_row + column, x, mask=column < r)
    tl.store(out_row + column, x, mask=column < r)


@triton.jit
def side_by_side_kernel(left, table, ids, out, r, k, left_stride, BLOCK: tl.constexpr):
    """out [n, r + k] = [left | table[ids]]."""
    row = tl.program_id(0).to(tl.int64)
    out_row = out + row * (r + k)
    for start in range(0, r, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(left + row * left_stride + column, mask=column < r)
        tl.store(out_row + column, x, mask=column < r)
    _gather(table, ids, row, out_row + r, k, BLOCK)


@triton.jit
def scaled_kernel(
    scales,
    codes,
    z,
    table,
    ids,
    out,
    r,
    k,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same with Ẑ as in mapl.codecs.scaled; fills z [n, r] too. LATENT ≥ r."""
    row = tl.program_id(0).to(tl.int64)
    out_row = out + row * (r + k)
    column = tl.arange(0, LATENT)
    place = row * r + column
    if FORMAT == "int4":
        both = tl.load(codes + place // 2, mask=column < r, other=0).to(tl.int32)
        code = tl.where(place % 2 == 0, both & 15, both >> 4)
    else:
        code = tl.load(codes + place, mask=column < r, other=0).to(tl.int32)
    group = row * tl.cdiv(r, GROUP) + column // GROUP
    scale = quantise.from_bf16_bits(tl.load(scales + group, mask=column < r, other=0).to(tl.int32))
    _keep(quantise.value(code, FORMAT) * scale, z + row * r, out_row, column, r, LIMIT)
    _gather(table, ids, row, out_row + r, k, BLOCK)


@triton.jit
def rvq_kernel(
    scales,
    codes,
    codebook,
    z,
    table,
    ids,
    out,
    r,
    k,
    ROUNDS: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same with Ẑ as in mapl.codecs.residual_vq: codes [n, G, R], codebook [G, R, K, v]."""
    row = tl.program_id(0).to(tl.int64)
    out_row = out + row * (r + k)
    column = tl.arange(0, LATENT)
    group = column // SIZE
    first = codes + (row * (r // SIZE) + group) * ROUNDS
    total = tl.zeros([LATENT], tl.float32)
    for number in tl.static_range(ROUNDS):
        code = tl.load(first + number, mask=column < r, other=0).to(tl.int32)
        entry = ((group * ROUNDS + number) * CODES + code) * SIZE + column % SIZE
        chosen = tl.load(codebook + entry, mask=column < r, other=0.0)
        if number == 0:  # in the reference's order: the ends must agree to the bit
            total = chosen
        else:
            total = total + chosen
    scale = quantise.from_bf16_bits(tl.load(scales + row).to(tl.int32))
    _keep(total * scale, z + row * r, out_row, column, r, LIMIT)
    _gather(table, ids, row, out_row + r, k, BLOCK)


def side_by_side(left: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """See `mapl.ops.gathered.reference_side_by_side`."""
    out = _empty(left, table)
    r, k = left.size(1), table.size(1)
    settings = _settings(r, k)
    launch(
        side_by_side_kernel,
        (left.size(0),),
        left,
        table,
        ids,
        out,
        r,
        k,
        left.stride(0),
        **settings,
    )
    return out


def from_scaled(
    body: Tensor, z: Tensor, table: Tensor, ids: Tensor, group: int, format: str
) -> Tensor:
    """[Ẑ | table[ids]] with Ẑ decoded from a body as mapl.ops.kernels.scaled does; z becomes Ẑ.

    Args:
        body: scales, then codes, uint8.
        z: [n, r], contiguous, filled.
        table: [V, k], of z's dtype.
        ids: [n].
        group: numbers that share a scale.
        format: a key of `quantise.LARGEST`.
    """
    out = _empty(z, table)
    (n, r), k = z.shape, table.size(1)
    scale_bytes = 2 * n * cdiv(r, group)
    launch(
        scaled_kernel,
        (n,),
        body[:scale_bytes].view(torch.int16), body[scale_bytes:], z, table, ids, out, r, k,
        FORMAT=format, GROUP=group, LIMIT=torch.finfo(z.dtype).max,
        LATENT=next_power_of_2(r), **_settings(r, k),
    )  # fmt: skip
    return out


def from_rvq(
    scales: Tensor, codes: Tensor, codebook: Tensor, z: Tensor, table: Tensor, ids: Tensor
) -> Tensor:
    """The same from residual vector quantisation.

    Args:
        scales: bf16 [n].
        codes: uint8 or int32, [n G R].
        codebook: [G, R, K, v] fp32.
        z, table, ids: as for `from_scaled`.
    """
    out = _empty(z, table)
    (n, r), k = z.shape, table.size(1)
    _, rounds, entries, size = codebook.shape
    launch(
        rvq_kernel,
        (n,),
        scales.view(torch.int16), codes, codebook, z, table, ids, out, r, k,
        ROUNDS=rounds, CODES=entries, SIZE=size, LIMIT=torch.finfo(z.dtype).max,
        LATENT=next_power_of_2(r), **_settings(r, k),
    )  # fmt: skip
    return out


def _empty(left: Tensor, table: Tensor) -> Tensor:
    width = left.size(1) + table.size(1)
    return torch.empty(left.size(0), width, dtype=left.dtype, device=left.device)


def _settings(r: int, k: int) -> dict[str, int]:
    return {"BLOCK": 1024, "num_warps": 4} if r + k >= 1024 else {"BLOCK": 512, "num_warps": 2}


_LIMIT = torch.finfo(torch.bfloat16).max
_OUT = {"table": "*bf16", "ids": "*i64", "out": "*bf16", "r": "i32", "k": "i32"}
_CODED = {"scales": "*i16", "codes": "*u8", "z": "*bf16", **_OUT}
_BLOCKS = {"LATENT": 256, "BLOCK": 1024}
_WARPS = {"num_warps": 4}
SPECIALISATIONS = [
    Specialisation(
        side_by_side_kernel,
        {"left": "*bf16", **_OUT, "left_stride": "i32"},
        {"BLOCK": 1024},
        _WARPS,
        ("left", *_OUT, "left_stride"),
    ),
    *(
        Specialisation(
            scaled_kernel,
            _CODED,
            {"FORMAT": format, "GROUP": 64, "LIMIT": _LIMIT, **_BLOCKS},
            _WARPS,
            tuple(_CODED),
        )
        for format in ("e4m3", "int8", "int4")
    ),
    Specialisation(
        rvq_kernel,
        {**_CODED, "codebook": "*fp32"},
        {"ROUNDS": 4, "CODES": 256, "SIZE": 8, "LIMIT": _LIMIT, **_BLOCKS},
        _WARPS,
        (*_CODED, "codebook"),
    ),
]
