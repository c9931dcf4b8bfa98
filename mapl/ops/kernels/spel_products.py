# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a SPEL step, each over a batch of equal-shaped matrices.

Legend: B projectors, tall matrices [d, r], square ones [r, r]. Each program computes one tile of
one projector, with tiles and an order of summation that depend on d and r alone. So a projector's
result is the same, bit for bit, whatever else is in the batch, which cuBLAS does not promise. Only
maxima, which heed no order, are formed by atomics.

fp32 operands are split into three bf16 parts each, whose sum they are exactly (from 2⁻¹¹⁰ on), and
the six products of parts that reach fp32's last bit go through the tensor cores ("bf16x6"). Tensor
cores truncate as they sum, so only a block of `DEPTH` is summed there, from zero; blocks are added
in fp32, rounded to nearest. Square matrices lie in memory as their parts, [B, 3, r, r] bf16, for
each is an operand many times: parts go to the tensor cores as they are loaded, where fp32 numbers
would be split in registers and written to shared memory by each program anew.

Tall matrices of separate projectors lie in separate allocations: such an operand is a pointer to
the first and a table of offsets from it, in elements.
"""

from typing import Any

import triton
import triton.language as tl

from mapl.ops.ahead_of_time import Specialisation

#: Tile of tall products, and how much of the summed dimension goes through tensor cores at once.
TALL, DEPTH = 128, 32
#: Rows that a Gram program sums before its part goes to memory. Eight boundaries of 4096×256 then
#: make 264 programs, two for each of Hopper's 132 multiprocessors.
SPLIT = 384
#: Tile and depth of products of square matrices, and tile of sums over the parts of a Gram matrix.
SQUARE, SQUARE_DEPTH, SUM = 64, 64, 32

TALL_OPTIONS = {"num_warps": 8, "num_stages": 3}
SQUARE_OPTIONS = {"num_warps": 4, "num_stages": 3}

#: What `sum_kernel` makes of LᵀR.
SYMMETRIC_PART, NORMALISED, PLAIN, FROM_IDENTITY = 0, 1, 2, 3

#: As a largest magnitude, what leaves the scale alone.
BITS_OF_TWO = 0x40000000

# The interpreter multiplies in fp32 whatever it is told, and does not know the name.
_PRECISION = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


@triton.jit
def _load(pointer, rows, columns, height, width):
    """A tile of a row-major matrix; zero outside of it."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, values, rows, columns, height, width):
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * width + columns[None, :], values, mask=inside)


@triton.jit
def _parts(x):
    """The three bf16 parts of fp32 numbers, the largest first; their sum is exact."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _square_at(pointer, b, R: tl.constexpr):
    """The b-th of square matrices."""
    return pointer + b.to(tl.int64) * 3 * R * R


@triton.jit
def _load_parts(pointer, rows, columns, R: tl.constexpr):
    """A tile of a square matrix: its three parts."""
    high = _load(pointer, rows, columns, R, R)
    middle = _load(pointer + R * R, rows, columns, R, R)
    return high, middle, _load(pointer + 2 * R * R, rows, columns, R, R)


@triton.jit
def _load_square(pointer, rows, columns, R: tl.constexpr):
    """A tile of a square matrix in fp32."""
    high, middle, low = _load_parts(pointer, rows, columns, R)
    return (high.to(tl.float32) + middle.to(tl.float32)) + low.to(tl.float32)


@triton.jit
def _store_square(pointer, values, rows, columns, R: tl.constexpr):
    high, middle, low = _parts(values)
    _store(pointer, high, rows, columns, R, R)
    _store(pointer + R * R, middle, rows, columns, R, R)
    _store(pointer + 2 * R * R, low, rows, columns, R, R)


@triton.jit
def _product(x_high, x_middle, x_low, y_high, y_middle, y_low):
    """XY of matrices given by their parts, the smallest products first."""
    total = tl.dot(x_low, y_high)
    total = tl.dot(x_high, y_low, total)
    total = tl.dot(x_middle, y_middle, total)
    total = tl.dot(x_middle, y_high, total)
    total = tl.dot(x_high, y_middle, total)
    return tl.dot(x_high, y_high, total)


@triton.jit
def _matrix(pointer, offsets, b):
    """The b-th matrix of an operand that is spread over allocations, each 16-byte aligned."""
    return pointer + tl.multiple_of(tl.load(offsets + b), 4)


@triton.jit
def _bits_of_largest(values):
    """The largest magnitude as the bits of an fp32, which order as it does; infinity for NaN."""
    magnitude = tl.where(values == values, tl.abs(values), float("inf"))
    return tl.max(tl.max(magnitude, 1), 0).to(tl.int32, bitcast=True)


@triton.jit
def _power_of_two(largest_ptr, b):
    """What brings a matrix whose largest magnitude has these bits into [2, 4), exactly."""
    exponent = tl.maximum(tl.load(largest_ptr + b) >> 23, 1)
    return ((255 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_of_triangle(index):
    """The row of the index-th tile of a lower triangle, counted row by row."""
    row = 0
    while (row + 1) * (row + 2) // 2 <= index:
        row += 1
    return row


@triton.jit
def gram_kernel(
    left_ptr,
    left_offsets,
    right_ptr,
    right_offsets,
    largest_ptr,
    parts_ptr,
    d,
    R: tl.constexpr,
    TRIANGLE: tl.constexpr,
    TALL: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """parts[b, s] = LᵀR over the s-th SPLIT rows; parts is [B, ⌈d/SPLIT⌉, r, r].

    Both are taken times the power of two that `largest` gives. TRIANGLE: L is R, so only tiles on
    and under the diagonal are formed. Grid: tiles, ⌈d/SPLIT⌉, B.
    """
    tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TRIANGLE:
        i = _row_of_triangle(tile)
        j = tile - i * (i + 1) // 2
    else:
        i, j = tile // tl.cdiv(R, TALL), tile % tl.cdiv(R, TALL)
    left = _matrix(left_ptr, left_offsets, b)
    right = _matrix(right_ptr, right_offsets, b)
    scale = _power_of_two(largest_ptr, b)
    rows, columns = i * TALL + tl.arange(0, TALL), j * TALL + tl.arange(0, TALL)
    total = tl.zeros((TALL, TALL), tl.float32)
    for k in range(0, SPLIT, DEPTH):
        depth = split * SPLIT + k + tl.arange(0, DEPTH)
        # Scaling does one thing more: a tile that is transposed as it was loaded would be copied
        # to shared memory by fours of bytes instead of sixteens, with bank conflicts.
        x, y = _load(left, depth, rows, d, R) * scale, _load(right, depth, columns, d, R) * scale
        total += tl.dot(tl.trans(x), y, input_precision=_PRECISION)
    part = parts_ptr + (b * tl.num_programs(1) + split).to(tl.int64) * R * R
    _store(part, total, rows, columns, R, R)


@triton.jit
def sum_kernel(
    parts_ptr,
    out_ptr,
    norm_ptr,
    distance_ptr,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MODE: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """out[b] = G = Σ_s parts[b, s] in the order of s, exactly symmetric, a square matrix.

    By MODE: the symmetric part of a G of which all tiles are given; else the lower triangle
    mirrored, divided by its trace, with norm[b] = 1/√trace (NORMALISED), as it is (PLAIN), or
    I − G, the bits of whose largest magnitude go to distance[b] (FROM_IDENTITY).
    Grid: tiles of the triangle, B.
    """
    b = tl.program_id(1)
    i = _row_of_triangle(tl.program_id(0))
    j = tl.program_id(0) - i * (i + 1) // 2
    rows, columns = i * SUM + tl.arange(0, SUM), j * SUM + tl.arange(0, SUM)
    first = parts_ptr + (b * SPLITS).to(tl.int64) * R * R
    lower = tl.zeros((SUM, SUM), tl.float32)
    upper = tl.zeros((SUM, SUM), tl.float32)
    for s in range(0, SPLITS):
        lower += _load(first + s * R * R, rows, columns, R, R)
        if MODE == 0:
            upper += _load(first + s * R * R, columns, rows, R, R)
    if MODE == 0:
        # Halves are taken before the sum, which could otherwise overflow for huge gradients.
        gram = 0.5 * lower + 0.5 * tl.trans(upper)
    else:
        gram = lower
    if MODE == 1:
        along = tl.arange(0, WIDTH)
        diagonal = tl.zeros((WIDTH,), tl.float32)
        for s in range(0, SPLITS):
            entries = first + s * R * R + along * (R + 1)
            diagonal += tl.load(entries, mask=along < R, other=0.0)
        trace = tl.sum(diagonal, 0)
        trace = tl.where(trace > 0, trace, 1.0)
        gram = gram / trace
        tl.store(norm_ptr + b, 1.0 / tl.sqrt(trace), mask=tl.program_id(0) == 0)
    if i == j:
        gram = tl.where(rows[:, None] >= columns[None, :], gram, tl.trans(gram))
    if MODE == 3:
        on_diagonal = (rows[:, None] == columns[None, :]) & (rows[:, None] < R)
        gram = tl.where(on_diagonal, 1.0, 0.0) - gram
        tl.atomic_max(distance_ptr + b, _bits_of_largest(gram))
    out = _square_at(out_ptr, b, R)
    _store_square(out, gram, rows, columns, R)
    if i != j:
        _store_square(out, tl.trans(gram), columns, rows, R)


# The size of the batch selects no other code, and so no other rounding.
@triton.jit(do_not_specialize=["batch"])
def square_kernel(
    left_ptr,
    other_left_ptr,
    right_ptr,
    added_ptr,
    other_added_ptr,
    out_ptr,
    other_out_ptr,
    batch,
    one,
    linear,
    quadratic,
    other_one,
    other_linear,
    other_quadratic,
    R: tl.constexpr,
    SQUARE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[b] = one·I + linear·D + quadratic·LR, all square matrices; the same for the others.

    Grid: column tiles, row tiles, B, or 2 B where there is another L, D and out.
    """
    b = tl.program_id(2)
    left, added, out = left_ptr, added_ptr, out_ptr
    if b >= batch:
        b -= batch
        left, added, out = other_left_ptr, other_added_ptr, other_out_ptr
        one, linear, quadratic = other_one, other_linear, other_quadratic
    left, added, out = _square_at(left, b, R), _square_at(added, b, R), _square_at(out, b, R)
    right = _square_at(right_ptr, b, R)
    rows = tl.program_id(1) * SQUARE + tl.arange(0, SQUARE)
    columns = tl.program_id(0) * SQUARE + tl.arange(0, SQUARE)
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for k in range(0, R, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        x_high, x_middle, x_low = _load_parts(left, rows, depth, R)
        y_high, y_middle, y_low = _load_parts(right, depth, columns, R)
        total += _product(x_high, x_middle, x_low, y_high, y_middle, y_low)
    identity = tl.where(rows[:, None] == columns[None, :], one, 0.0)
    linear_term = linear * _load_square(added, rows, columns, R)
    _store_square(out, identity + linear_term + quadratic * total, rows, columns, R)


@triton.jit
def _tall_product(
    x, scale, q, rows, columns, d, R: tl.constexpr, TALL: tl.constexpr, DEPTH: tl.constexpr
):
    """A tile of (scale·X)Q: X [d, r], Q a square matrix."""
    total = tl.zeros((TALL, TALL), tl.float32)
    for k in range(0, R, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        x_high, x_middle, x_low = _parts(_load(x, rows, depth, d, R) * scale)
        y_high, y_middle, y_low = _load_parts(q, depth, columns, R)
        total += _product(x_high, x_middle, x_low, y_high, y_middle, y_low)
    return total


@triton.jit
def _tall_tile(TALL: tl.constexpr):
    """Row and column indices of this program's tile, and its projector."""
    columns = tl.program_id(0) * TALL + tl.arange(0, TALL)
    return tl.program_id(1) * TALL + tl.arange(0, TALL), columns, tl.program_id(2)


@triton.jit
def momentum_kernel(
    a_ptr,
    a_offsets,
    grad_ptr,
    grad_offsets,
    momentum_ptr,
    momentum_offsets,
    symmetric_ptr,
    out_ptr,
    largest_ptr,
    keep,
    take,
    d,
    R: tl.constexpr,
    TALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = keep·m + take·(g − A S), [B, d, r]; the bits of its largest magnitude go to largest[b].

    Grid, here and below: column tiles, row tiles, B.
    """
    rows, columns, b = _tall_tile(TALL)
    a = _matrix(a_ptr, a_offsets, b)
    symmetric = _square_at(symmetric_ptr, b, R)
    product = _tall_product(a, 1.0, symmetric, rows, columns, d, R, TALL, DEPTH)
    grad = _load(_matrix(grad_ptr, grad_offsets, b), rows, columns, d, R)
    momentum = _load(_matrix(momentum_ptr, momentum_offsets, b), rows, columns, d, R)
    momentum = keep * momentum + take * (grad - product)
    tl.atomic_max(largest_ptr + b, _bits_of_largest(momentum))
    _store(out_ptr + b.to(tl.int64) * d * R, momentum, rows, columns, d, R)


@triton.jit
def apply_kernel(
    x_ptr,
    q_ptr,
    out_ptr,
    largest_ptr,
    norm_ptr,
    d,
    R: tl.constexpr,
    TALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = norm[b] · (2ᵉX)Q with the power of two that `largest` gives, [B, d, r]."""
    rows, columns, b = _tall_tile(TALL)
    at = b.to(tl.int64) * d * R
    scale = _power_of_two(largest_ptr, b)
    q = _square_at(q_ptr, b, R)
    total = _tall_product(x_ptr + at, scale, q, rows, columns, d, R, TALL, DEPTH)
    _store(out_ptr + at, total * tl.load(norm_ptr + b), rows, columns, d, R)


@triton.jit
def descend_kernel(
    a_ptr,
    a_offsets,
    x_ptr,
    q_ptr,
    lr_ptr,
    out_ptr,
    d,
    R: tl.constexpr,
    TALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = A − α XQ, [B, d, r]."""
    rows, columns, b = _tall_tile(TALL)
    at = b.to(tl.int64) * d * R
    q = _square_at(q_ptr, b, R)
    product = _tall_product(x_ptr + at, 1.0, q, rows, columns, d, R, TALL, DEPTH)
    a = _load(_matrix(a_ptr, a_offsets, b), rows, columns, d, R)
    _store(out_ptr + at, a - tl.load(lr_ptr) * product, rows, columns, d, R)


@triton.jit
def commit_kernel(
    y_ptr,
    correction_ptr,
    new_momentum_ptr,
    a_ptr,
    a_offsets,
    momentum_ptr,
    momentum_offsets,
    lr_ptr,
    largest_ptr,
    distance_ptr,
    ok_ptr,
    highest_lr,
    furthest,
    d,
    R: tl.constexpr,
    TALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A = Y + YC and m = its new value where the step is sound, which ok[b] tells; else nothing.

    Sound: m is finite, 0 ≤ α ≤ highest_lr, and YᵀY is within `furthest` of I.
    """
    rows, columns, b = _tall_tile(TALL)
    at = b.to(tl.int64) * d * R
    lr = tl.load(lr_ptr)
    finite = tl.load(largest_ptr + b) < 0x7F800000
    distance = tl.load(distance_ptr + b).to(tl.float32, bitcast=True)
    ok = finite & (lr >= 0) & (lr <= highest_lr) & (distance <= furthest)
    tl.store(ok_ptr + b, ok, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    if ok:
        correction = _square_at(correction_ptr, b, R)
        product = _tall_product(y_ptr + at, 1.0, correction, rows, columns, d, R, TALL, DEPTH)
        a = _load(y_ptr + at, rows, columns, d, R) + product
        _store(_matrix(a_ptr, a_offsets, b), a, rows, columns, d, R)
        momentum = _load(new_momentum_ptr + at, rows, columns, d, R)
        _store(_matrix(momentum_ptr, momentum_offsets, b), momentum, rows, columns, d, R)


def _specialisation(kernel: Any, rank: int, **constants: int | bool) -> Specialisation:
    """What a launch for matrices of `rank`, whole multiples of 16, asks for."""
    constants["R"] = rank
    types = {"d": "i32", "batch": "i32", "ok_ptr": "*i1"}
    if kernel is square_kernel:
        types |= {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    elif kernel is sum_kernel:
        types["out_ptr"] = "*bf16"
    types |= dict.fromkeys(("symmetric_ptr", "q_ptr", "correction_ptr"), "*bf16")
    types |= dict.fromkeys(("largest_ptr", "distance_ptr"), "*i32")
    names = [name for name in kernel.arg_names if name not in constants]
    for name in names:
        kind = "*i64" if name.endswith("_offsets") else "*fp32" if name.endswith("_ptr") else "fp32"
        types.setdefault(name, kind)
    return Specialisation(
        kernel,
        {name: types[name] for name in names},
        constants,
        TALL_OPTIONS if "TALL" in constants else SQUARE_OPTIONS,
        tuple(name for name in names if name == "d" or name.endswith(("_ptr", "_offsets"))),
    )


def _specialisations(rank: int) -> list[Specialisation]:
    tall = {"TALL": TALL, "DEPTH": DEPTH}
    return [
        *(
            _specialisation(gram_kernel, rank, TRIANGLE=triangle, SPLIT=SPLIT, **tall)
            for triangle in (False, True)
        ),
        *(
            _specialisation(sum_kernel, rank, SPLITS=11, MODE=mode, WIDTH=rank, SUM=SUM)
            for mode in (SYMMETRIC_PART, NORMALISED, PLAIN, FROM_IDENTITY)
        ),
        _specialisation(square_kernel, rank, SQUARE=SQUARE, DEPTH=SQUARE_DEPTH),
        *(
            _specialisation(kernel, rank, **tall)
            for kernel in (momentum_kernel, apply_kernel, descend_kernel, commit_kernel)
        ),
    ]


SPECIALISATIONS = [item for rank in (128, 256, 512) for item in _specialisations(rank)]
