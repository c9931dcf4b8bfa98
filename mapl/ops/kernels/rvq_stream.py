# SPDX-License-Identifier: Apache-2.0
"""Codebook entries that go along with a payload: out of the master on one end, into the other copy.

Shapes: G groups, R rounds, K codes of v numbers; c codes are due with a payload, e of them, which
stand together, in one body [G, R, e, v].
"""

import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

#: Numbers that a program takes.
_TILE = 1024


def send(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    due: Tensor,
    mine: slice,
    body: Tensor,
    no_count: float,
) -> None:
    """Gives the copy the master's entries that are due, and writes this process's into the body.

    An entry is sums / counts, or that of the copy where the count is at most `no_count`.

    Args:
        codebook: [G, R, K, v] fp32, written to.
        counts: [G, R, K] fp32.
        sums: [G, R, K, v] fp32.
        due: int64 [c]; a code may occur twice.
        mine: which of them are this process's.
        body: in the wire dtype, [G R e v], written.
    """
    _launch(_send_entries, codebook, counts, sums, due, mine, body, NO_COUNT=no_count)


def take(codebook: Tensor, due: Tensor, theirs: slice, body: Tensor) -> None:
    """Gives the copy the entries of one body, those of the codes due[theirs]."""
    _launch(_take_entries, codebook, due[theirs], slice(0, len(due[theirs])), body)


def _launch(kernel, codebook: Tensor, *args, **constants: float) -> None:
    *tensors, due, mine, body = args
    groups, rounds, codes, size = codebook.shape
    padded = next_power_of_2(size)
    block = max(1, _TILE // padded)
    count = groups * rounds * len(due)
    launch(
        kernel,
        (cdiv(count, block),),
        codebook,
        *tensors,
        due,
        body,
        count,
        DUE=len(due),
        FIRST=mine.start,
        EACH=mine.stop - mine.start,
        CODES=codes,
        SIZE=size,
        PADDED=padded,
        BLOCK=block,
        **constants,
    )


@triton.jit
def _places(
    due,
    count,
    DUE: tl.constexpr,
    FIRST: tl.constexpr,
    EACH: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a program's entries: which are there and of which numbers; entry in the codebook, place
    of its numbers in that and in the body, and whether it stands in the body."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    book = number // DUE
    position = number % DUE
    entry = book * CODES + tl.load(due + position, mask=inside, other=0).to(tl.int32)
    slot = position - FIRST
    carried = inside & (slot >= 0) & (slot < EACH)
    dim = tl.arange(0, PADDED)[None, :]
    filled = inside[:, None] & (dim < SIZE)
    place = entry[:, None] * SIZE + dim
    in_body = (book * EACH + slot)[:, None] * SIZE + dim
    return inside, filled, entry, place, in_body, carried[:, None] & filled


@triton.jit
def _send_entries(
    codebook,
    counts,
    sums,
    due,
    body,
    count,
    DUE: tl.constexpr,
    FIRST: tl.constexpr,
    EACH: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    NO_COUNT: tl.constexpr,
):
    inside, filled, entry, place, in_body, carried = _places(
        due, count, DUE, FIRST, EACH, CODES, SIZE, PADDED, BLOCK
    )
    uses = tl.load(counts + entry, mask=inside, other=0.0)
    total = tl.load(sums + place, mask=filled, other=0.0)
    old = tl.load(codebook + place, mask=filled, other=0.0)
    some = tl.broadcast_to(tl.maximum(uses, NO_COUNT)[:, None], [BLOCK, PADDED])
    mean = tl.where((uses > NO_COUNT)[:, None], tl.div_rn(total, some), old)
    sent = mean.to(body.dtype.element_ty)
    tl.store(codebook + place, sent.to(tl.float32), mask=filled)
    tl.store(body + in_body, sent, mask=carried)


@triton.jit
def _take_entries(
    codebook,
    due,
    body,
    count,
    DUE: tl.constexpr,
    FIRST: tl.constexpr,
    EACH: tl.constexpr,
    CODES: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, _, _, place, in_body, carried = _places(
        due, count, DUE, FIRST, EACH, CODES, SIZE, PADDED, BLOCK
    )
    entries = tl.load(body + in_body, mask=carried, other=0.0).to(tl.float32)
    tl.store(codebook + place, entries, mask=carried)


_SIZES = {"DUE": 1, "FIRST": 0, "EACH": 1, "CODES": 256, "SIZE": 8, "PADDED": 8, "BLOCK": 128}
_TYPES = {"codebook": "*fp32", "due": "*i64", "body": "*bf16", "count": "i32"}

SPECIALISATIONS = [
    Specialisation(
        _send_entries,
        {**_TYPES, "counts": "*fp32", "sums": "*fp32"},
        {**_SIZES, "NO_COUNT": 2.0**-80},
        divisible=("codebook", "counts", "sums", "count"),
    ),
    Specialisation(_take_entries, _TYPES, _SIZES, divisible=("codebook", "count")),
]
