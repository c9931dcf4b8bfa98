# SPDX-License-Identifier: Apache-2.0
"""Kernels of mapl.ops.scatter: tokens sorted, and a sum over those of equal id without atomics.

The tokens, in the order of their ids, are cut into chunks. A run of equal ids that lies inside a
chunk is added to its row of the total at once; what a run has in other chunks is kept apart, one
row a chunk, and added in order by a second kernel. So the time depends little on how often the most
common token occurs.

Shapes: n tokens, C of them a chunk, k numbers a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

_CHUNK = 32
_COLUMNS = 256
#: Tokens of a program that sorts, and those that it compares them with at a time.
_OWN = 16
_OTHERS = 512


@triton.jit
def ascending_kernel(ids, ascending, places, n, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """Puts each of ids [n] behind those that are smaller, or the same and earlier.

    ascending [n] are the ids in that order and places [n] where each stood.
    """
    place = tl.program_id(0) * OWN + tl.arange(0, OWN)
    this = tl.load(ids + place, mask=place < n, other=0)
    before = tl.zeros([OWN, OTHERS], tl.int32)
    for start in range(0, n, OTHERS):
        other = start + tl.arange(0, OTHERS)
        that = tl.load(ids + other, mask=other < n, other=0)
        is_earlier = other[None, :] < place[:, None]
        is_before = (that[None, :] < this[:, None]) | (that[None, :] == this[:, None]) & is_earlier
        before += (is_before & (other < n)[None, :]).to(tl.int32)
    rank = tl.sum(before, 1)
    tl.store(ascending + rank, this.to(tl.int32), mask=place < n)
    tl.store(places + rank, place, mask=place < n)


@triton.jit
def _runs(ids, chunk, n, CHUNK: tl.constexpr):
    """The runs of equal ids in a chunk.

    Returns:
        The ids [C] (−1 beyond the last token), which run of the chunk each belongs to [C], how many
        runs there are, less one, and whether the first and the last go on outside of the chunk.
    """
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    these = tl.load(ids + place, mask=place < n, other=-1)
    before = tl.load(ids + place - 1, mask=(place > 0) & (place < n), other=-1)
    inside = tl.arange(0, CHUNK) > 0
    run = tl.cumsum(((these != before) & inside).to(tl.int32), 0)
    end = chunk * CHUNK + CHUNK
    after = tl.load(ids + end, mask=end < n, other=-2)
    first = tl.load(ids + chunk * CHUNK)
    last = tl.load(ids + tl.minimum(end, n) - 1)
    start = chunk * CHUNK
    ahead = tl.load(ids + start - 1, mask=start > 0, other=-2)
    return these, run, tl.max(run, 0), ahead == first, after == last


@triton.jit
def scatter_add_kernel(
    total,
    ids,
    places,
    rows,
    more,
    parts,
    n,
    k,
    row_stride,
    more_stride,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the runs that lie inside a chunk; keeps the parts of the others.

    ids [n] ascending, places [n], rows and more [n, k] (more may be None), total [V, k];
    parts [2, chunks, k] fp32, of the first and of the last runs.
    """
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = columns < k
    these, run, last_run, from_before, to_next = _runs(ids, chunk, n, CHUNK)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(places + place, mask=place < n, other=0).to(tl.int64)
    mask = (place < n)[:, None] & wanted[None, :]
    values = tl.load(rows + row[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    number = tl.arange(0, CHUNK)
    # Products of finite numbers with 0 and 1 are exact, so this only adds.
    member = number[:, None] == run[None, :]
    sums = tl.dot(member.to(tl.float32).to(values.dtype), values, input_precision="ieee")
    if more is not None:
        values = tl.load(more + row[:, None] * more_stride + columns[None, :], mask=mask, other=0.0)
        sums += tl.dot(member.to(tl.float32).to(values.dtype), values, input_precision="ieee")

    id_of_run = tl.max(tl.where(member, these[None, :], -1), 1).to(tl.int64)
    is_part = ((number == 0) & from_before) | ((number == last_run) & to_next)
    whole = (number <= last_run) & (id_of_run >= 0) & (is_part == 0)
    target = total + id_of_run[:, None] * k + columns[None, :]
    mask = whole[:, None] & wanted[None, :]
    old = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (old + sums).to(total.dtype.element_ty), mask=mask)

    kept = parts + chunk.to(tl.int64) * k + columns
    first = tl.sum(tl.where((number == 0)[:, None], sums, 0.0), 0)
    tl.store(kept, first, mask=wanted & from_before)
    last = tl.sum(tl.where((number == last_run)[:, None], sums, 0.0), 0)
    kept += tl.num_programs(0).to(tl.int64) * k
    tl.store(kept, last, mask=wanted & to_next)


@triton.jit
def add_parts_kernel(total, ids, parts, n, k, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds the run that starts in a chunk and goes on in the next ones, if there is one."""
    chunk = tl.program_id(0)
    _, _, last_run, from_before, to_next = _runs(ids, chunk, n, CHUNK)
    if to_next & ((last_run > 0) | (from_before == 0)):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = columns < k
        last_parts = parts + tl.num_programs(0).to(tl.int64) * k
        value = tl.load(last_parts + chunk.to(tl.int64) * k + columns, mask=wanted)
        this = tl.load(ids + chunk * CHUNK + CHUNK - 1)
        # The run has a part in each chunk that starts with its id.
        chunk += 1
        goes_on = chunk * CHUNK < n
        while goes_on:
            value += tl.load(parts + chunk.to(tl.int64) * k + columns, mask=wanted)
            chunk += 1
            start = chunk * CHUNK
            goes_on = tl.load(ids + start, mask=start < n, other=-1) == this
        target = total + this.to(tl.int64) * k + columns
        old = tl.load(target, mask=wanted).to(tl.float32)
        tl.store(target, (old + value).to(total.dtype.element_ty), mask=wanted)


def ascending(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sorted ids, int32 [n], and where each stood, int32 [n]; equal ids in order."""
    n = ids.numel()
    sorted_ids = torch.empty(n, dtype=torch.int32, device=ids.device)
    places = torch.empty_like(sorted_ids)
    sizes = {"OWN": _OWN, "OTHERS": _OTHERS, "num_warps": 4}
    launch(ascending_kernel, (cdiv(n, _OWN),), ids, sorted_ids, places, n, **sizes)
    return sorted_ids, places


def scatter_add(
    total: Tensor, ids: Tensor, places: Tensor, rows: Tensor, more: Tensor | None
) -> None:
    """See `mapl.ops.scatter.scatter_add`; ids ascending, places where each stood."""
    n, k = rows.shape
    chunks = cdiv(n, _CHUNK)
    columns = min(_COLUMNS, max(16, next_power_of_2(k)))
    parts = torch.empty(2, chunks, k, dtype=torch.float32, device=rows.device)
    grid = (chunks, cdiv(k, columns))
    sizes = {"CHUNK": _CHUNK, "COLUMNS": columns, "num_warps": 4}
    more_stride = 0 if more is None else more.stride(0)
    launch(
        scatter_add_kernel,
        grid,
        total,
        ids,
        places,
        rows,
        more,
        parts,
        n,
        k,
        rows.stride(0),
        more_stride,
        **sizes,
    )
    launch(add_parts_kernel, grid, total, ids, parts, n, k, **sizes)


_ORDER = {"ids": "*i32", "ascending": "*i32", "places": "*i32", "n": "i32"}
_ADD = {"total": "*fp32", "ids": "*i32", "parts": "*fp32", "n": "i32", "k": "i32"}
_TILES = {"CHUNK": _CHUNK, "COLUMNS": _COLUMNS}
_ROWS = {"places": "*i32", "rows": "*bf16", "row_stride": "i32", "more_stride": "i32"}
_ONE, _TWO = {**_ADD, **_ROWS}, {**_ADD, **_ROWS, "more": "*bf16"}
_WARPS = {"num_warps": 4}
SPECIALISATIONS = [
    Specialisation(
        ascending_kernel, _ORDER, {"OWN": _OWN, "OTHERS": _OTHERS}, _WARPS, tuple(_ORDER)
    ),
    Specialisation(scatter_add_kernel, _ONE, {**_TILES, "more": None}, _WARPS, tuple(_ONE)),
    Specialisation(scatter_add_kernel, _TWO, _TILES, _WARPS, tuple(_TWO)),
    Specialisation(add_parts_kernel, _ADD, _TILES, _WARPS, tuple(_ADD)),
]
