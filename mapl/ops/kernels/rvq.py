# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantisation: scales, search of all rounds and statistics, and the way back.

A program of the search takes some rows and one group of them, and keeps what each round leaves of
its vectors in registers. Scores e·c − ‖c‖² / 2 come from the tensor cores, whose fp32 operands have
11 significant bits (TF32). A vector is therefore split in two such parts, e = h + l, which stand
beside each other,

    [h | l] · [c ; c] = e·c  with an error of 2⁻²² |e| |c|,

and fill with v = 8 just the 16 places that an instruction asks for. A codebook whose numbers are
bf16 or fp16 is exact in TF32; one of fp32 numbers is split as well, c = a + b, and h·b added.

Counts and sums are added up by atomics, in no fixed order: two runs differ in their last bits. They
are added up over processes before anyone uses them, and the codebook itself crosses the wire.

Shapes: n rows of w numbers, G groups of v = w / G; R rounds, K codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.kernels import quantise
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

#: Rows of a program of the search, codes that it compares at once, and warps that do so. The scores
#: take ROWS · CHUNK / (32 · WARPS) registers of a thread.
_ROWS = 64
_CHUNK = 128
_WARPS = 4
#: Wider vectors, both parts of them together, leave registers for half as many scores.
_NARROW = 32
#: Numbers that a program of the other kernels takes.
_TILE = 2048


def encode(
    rows: Tensor,
    codebook: Tensor,
    scales: Tensor,
    codes: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    *,
    exact: bool,
) -> None:
    """What `normalised`, `search` and `add_statistics` of mapl.codecs.residual_search do.

    Args:
        rows: [n, w] of a floating dtype.
        codebook: [G, R, K, v] fp32.
        scales: bf16 [n], written.
        codes: uint8 or int32 [n G R], written.
        statistics: counts [G, R, K] and sums [G, R, K, v], fp32 and added to, or None.
        exact: whether the numbers of the codebook have at most 11 significant bits.
    """
    count, width = rows.shape
    if not count:
        return
    rows, bits = rows.detach().contiguous(), scales.view(torch.int16)
    padded = next_power_of_2(width)
    few = max(1, _TILE // padded)
    launch(
        _row_scales, (cdiv(count, few),), rows, bits, count, WIDTH=width, PADDED=padded, ROWS=few
    )
    groups, rounds, entries, size = codebook.shape
    half_norms = torch.empty(codebook.shape[:3], dtype=torch.float32, device=rows.device)
    padded = next_power_of_2(size)
    block = _TILE // padded
    launch(
        _half_norms,
        (cdiv(half_norms.numel(), block),),
        codebook,
        half_norms,
        half_norms.numel(),
        SIZE=size,
        PADDED=padded,
        BLOCK=block,
    )
    dot = max(16, 2 * padded)
    chunk = _CHUNK if dot <= _NARROW else _CHUNK // 2
    counts, sums = statistics or (codebook, codebook)
    launch(
        _search,
        (cdiv(count, _ROWS), groups),
        rows,
        bits,
        codebook,
        half_norms,
        codes,
        counts,
        sums,
        count,
        WIDTH=width,
        GROUPS=groups,
        ROUNDS=rounds,
        CODES=entries,
        SIZE=size,
        PADDED=padded,
        DOT=dot,
        EXACT=exact,
        LEARN=statistics is not None,
        ROWS=_ROWS,
        CHUNK=min(chunk, max(16, entries)),
        num_warps=_WARPS,
    )


def decode(scales: Tensor, codes: Tensor, codebook: Tensor, out: Tensor) -> None:
    """out = Σ over the rounds of the entries, in that order, × the row's scale, clamped.

    Args:
        scales: bf16 [n].
        codes: uint8 or int32 [n G R].
        codebook: [G, R, K, v] fp32.
        out: [n, w], contiguous, written.
    """
    if not out.numel():
        return
    groups, rounds, entries, size = codebook.shape
    launch(
        _reconstruct,
        (cdiv(out.numel(), _TILE),),
        scales.view(torch.int16),
        codes,
        codebook,
        out.detach(),
        out.numel(),
        WIDTH=out.shape[1],
        GROUPS=groups,
        ROUNDS=rounds,
        CODES=entries,
        SIZE=size,
        LIMIT=torch.finfo(out.dtype).max,
        BLOCK=_TILE,
    )


@triton.jit
def _row_scales(rows, scales, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)[None, :]
    inside = (row < count)[:, None] & (column < WIDTH)
    x = tl.load(rows + row[:, None] * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(quantise.magnitude(x), 1)
    # 2⁻¹²⁶ or more: squares of the rows themselves would leave the range of fp32.
    unit = tl.maximum(largest, 0x00800000).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(x, unit[:, None])
    rms = unit * tl.sqrt_rn(tl.sum(quotient * quotient, 1) / WIDTH)
    rms = tl.where(rms < 1.1754943508222875e-38, 1.1754943508222875e-38, rms)
    bits = quantise.bf16_nearest_bits(tl.where(largest == 0, 0.0, rms))
    bits = tl.where(largest >= 0x7F800000, 0x7FC0, bits)
    tl.store(scales + row, bits.to(tl.int16), mask=row < count)


@triton.jit
def _half_norms(
    codebook, half_norms, count, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, PADDED)[None, :]
    inside = (entry < count)[:, None] & (dim < SIZE)
    c = tl.load(codebook + entry[:, None].to(tl.int64) * SIZE + dim, mask=inside, other=0.0)
    tl.store(half_norms + entry, tl.sum(c * c, 1) * 0.5, mask=entry < count)


@triton.jit
def _tf32(x):
    """The nearest fp32 number of 11 significant bits."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search(
    rows,
    scales,
    codebook,
    half_norms,
    codes,
    counts,
    sums,
    count,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
    LEARN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inside = row < count
    # A vector's numbers stand in two places each: place % PADDED, for h and for l.
    place = tl.arange(0, DOT)
    dim = place % PADDED
    used = (dim < SIZE) & (place < 2 * PADDED)
    is_high = (place < PADDED)[None, :]
    where = row[:, None] * WIDTH + group * SIZE + dim[None, :]
    x = tl.load(rows + where, mask=inside[:, None] & used[None, :], other=0.0).to(tl.float32)
    scale = quantise.from_bf16_bits(tl.load(scales + row, mask=inside, other=0).to(tl.int32))
    residual = tl.div_rn(x, tl.broadcast_to(scale[:, None], [ROWS, DOT]))
    residual = tl.where(residual == residual, residual, 0.0)
    counted = inside & (scale > 0)
    summed = counted[:, None] & (used & (place < PADDED))[None, :]
    for number in range(ROUNDS):
        first = (group * ROUNDS + number) * CODES
        high = _tf32(residual)
        split = tl.where(is_high, high, _tf32(residual - high))
        best = tl.full([ROWS], float("-inf"), tl.float32)
        found = tl.zeros([ROWS], tl.int32)
        for start in range(0, CODES, CHUNK):
            code = start + tl.arange(0, CHUNK)
            entry = (first + code)[None, :] * SIZE + dim[:, None]
            c = tl.load(codebook + entry, mask=used[:, None] & (code < CODES)[None, :], other=0.0)
            if EXACT:
                scores = tl.dot(split, c, input_precision="tf32")
            else:
                rounded = _tf32(c)
                scores = tl.dot(split, rounded, input_precision="tf32")
                rest = tl.where(is_high, high, 0.0)
                scores = tl.dot(rest, c - rounded, scores, input_precision="tf32")
            offset = tl.load(half_norms + first + code, mask=code < CODES, other=float("inf"))
            scores = scores - offset[None, :]
            top = tl.max(scores, 1)
            # The first of equals, as argmax takes it.
            which = tl.min(tl.where(scores == top[:, None], code[None, :], CODES), 1)
            found = tl.where(top > best, which, found)
            best = tl.maximum(best, top)
        at = (row * GROUPS + group) * ROUNDS + number
        tl.store(codes + at, found.to(codes.dtype.element_ty), mask=inside)
        entry = (first + found)[:, None] * SIZE + dim[None, :]
        if LEARN:
            tl.atomic_add(counts + first + found, 1.0, mask=counted, sem="relaxed")
            tl.atomic_add(sums + entry, residual, mask=summed, sem="relaxed")
        chosen = tl.load(
            codebook + entry, mask=tl.broadcast_to(used[None, :], [ROWS, DOT]), other=0.0
        )
        residual = residual - chosen


@triton.jit
def _reconstruct(
    scales,
    codes,
    codebook,
    out,
    count,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row = place // WIDTH
    column = (place - row * WIDTH).to(tl.int32)
    group = column // SIZE
    first = codes + (row * GROUPS + group) * ROUNDS
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(ROUNDS):
        code = tl.load(first + number, mask=inside, other=0).to(tl.int32)
        entry = ((group * ROUNDS + number) * CODES + code) * SIZE + column % SIZE
        chosen = tl.load(codebook + entry, mask=inside, other=0.0)
        if number == 0:
            total = chosen
        else:
            total = total + chosen
    bits = tl.load(scales + row, mask=inside, other=0).to(tl.int32)
    x = quantise.clamped(total * quantise.from_bf16_bits(bits), LIMIT)
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


_SIZES = {"WIDTH": 256, "GROUPS": 32, "ROUNDS": 4, "CODES": 256, "SIZE": 8}
_SEARCH = {**_SIZES, "PADDED": 8, "DOT": 16, "ROWS": _ROWS, "CHUNK": _CHUNK}
_WIDE = {**_SEARCH, "GROUPS": 8, "SIZE": 32, "PADDED": 32, "DOT": 64, "CHUNK": _CHUNK // 2}
_POINTERS = ("rows", "scales", "codebook", "half_norms", "codes", "counts", "sums")

SPECIALISATIONS = [
    Specialisation(
        _row_scales,
        {"rows": "*bf16", "scales": "*i16", "count": "i32"},
        {"WIDTH": 256, "PADDED": 256, "ROWS": _TILE // 256},
        divisible=("rows", "scales", "count"),
    ),
    Specialisation(
        _half_norms,
        {"codebook": "*fp32", "half_norms": "*fp32", "count": "i32"},
        {"SIZE": 8, "PADDED": 8, "BLOCK": _TILE // 8},
        divisible=("codebook", "half_norms", "count"),
    ),
    *(
        Specialisation(
            _search,
            {
                **{"rows": "*fp32" if not exact else "*bf16", "scales": "*i16", "codes": "*u8"},
                **dict.fromkeys(("codebook", "half_norms", "counts", "sums"), "*fp32"),
                "count": "i32",
            },
            {**sizes, "EXACT": exact, "LEARN": learn},
            {"num_warps": _WARPS},
            divisible=(*_POINTERS, "count"),
        )
        for sizes, exact, learn in [
            (_SEARCH, True, True),
            (_SEARCH, True, False),
            (_SEARCH, False, True),
            (_WIDE, True, True),
            (_WIDE, False, True),
        ]
    ),
    Specialisation(
        _reconstruct,
        {"scales": "*i16", "codes": "*u8", "codebook": "*fp32", "out": "*bf16", "count": "i32"},
        {**_SIZES, "LIMIT": torch.finfo(torch.bfloat16).max, "BLOCK": _TILE},
        divisible=("scales", "codes", "codebook", "out", "count"),
    ),
]
