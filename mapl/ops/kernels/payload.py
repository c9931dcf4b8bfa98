# SPDX-License-Identifier: Apache-2.0
"""The frame of a payload, written and checked in one kernel each: see mapl.payload.

A checksum is a sum of int64 words, which wraps: its parts may be added up by atomics in any order
and always give the same. Sequence numbers and header words are arguments of the launch, so nothing
is copied from the host.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapl.ops.ahead_of_time import Specialisation
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv

#: Words and ids that a program takes. The first programs do both.
_WORDS = 1024
_IDS = 1024


def seal(
    header: Sequence[int], payload: Tensor, ids: Tensor | None, id_size: int, padding: int
) -> None:
    """Writes header, ids, zeros behind the body and the checksum.

    Args:
        header: its four words.
        payload: uint8, as long as the header says; its body stands in its place already.
        ids: integers, or None.
        id_size: bytes that one takes.
        padding: bytes between the body and the checksum.
    """
    first, place, sequence, total = header
    launch(
        _seal_payload,
        (cdiv(total - 8, 8 * _WORDS),),
        payload,
        payload if ids is None else ids.contiguous(),
        _sums(payload),
        sequence,
        place,
        total,
        0 if ids is None else ids.numel(),
        padding,
        FIRST=first,
        ID_SIZE=0 if ids is None else id_size,
        BLOCK=_WORDS,
        num_warps=8,
    )


def check(
    header: Sequence[int],
    payload: Tensor,
    mark: Tensor,
    id_count: int,
    id_size: int,
    vocab_size: int,
) -> Tensor | None:
    """Makes `mark` the least of itself and the sequence number that is due if this is not it.

    Args:
        header: the four words that are due.
        payload: uint8, as long as they say.
        mark: int64, 0-dim.
        id_count: how many token ids it carries.
        id_size: bytes that one takes.
        vocab_size: they are less than this.

    Returns:
        The ids int32 [id_count], clamped to the vocabulary, or None if it has none.
    """
    first, place, sequence, total = header
    ids = None
    if id_count:
        ids = torch.empty(id_count, dtype=torch.int32, device=payload.device)
    launch(
        _check_payload,
        (max(cdiv(total, 8 * _WORDS), cdiv(id_count, _IDS)),),
        payload,
        payload if ids is None else ids,
        _sums(payload),
        mark,
        sequence,
        place,
        total,
        id_count,
        vocab_size - 1,
        FIRST=first,
        ID_SIZE=0 if ids is None else id_size,
        BLOCK=_WORDS,
        IDS=_IDS,
        num_warps=8,
    )
    return ids


def _sums(payload: Tensor) -> Tensor:
    """Where a launch sums up: int64 [2], zeros, which it leaves behind as zeros.

    Launches on one stream come one after the other; those of two must not share it. A captured
    graph may be replayed on any stream, and gets its own.
    """
    # Kernels take its bytes for words.
    assert payload.data_ptr() % 8 == 0 and payload.is_contiguous(), "a payload is whole words"
    device = payload.device
    if device.type != "cuda":
        return _zeros(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _zeros.__wrapped__(device, 0)
    return _zeros(device, torch._C._cuda_getCurrentRawStream(device.index))


@cache
def _zeros(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=device)


_HEADER = tl.constexpr(4)  # words


@triton.jit
def _header(word, sequence, place, total, FIRST: tl.constexpr):
    """The words of the header; what stands beyond it means nothing."""
    zero = tl.zeros(word.shape, tl.int64)
    header = tl.where(word == 1, zero + place, zero + FIRST)
    header = tl.where(word == 2, zero + sequence, header)
    return tl.where(word == 3, zero + total, header)


@triton.jit
def _as_words(payload):
    return payload.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit(do_not_specialize=["sequence", "place", "total", "id_count", "padding"])
def _seal_payload(
    payload,
    ids,
    sums,
    sequence,
    place,
    total,
    id_count,
    padding,
    FIRST: tl.constexpr,
    ID_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    content = _as_words(payload)
    closing = total // 8 - 1
    body = _HEADER + (id_count * ID_SIZE + 7) // 8
    start = tl.program_id(0) * BLOCK
    word = start + tl.arange(0, BLOCK)
    inside = (word >= body) & (word < closing)
    value = tl.load(content + word, mask=inside, other=0)
    is_last = (word == closing - 1) & (padding > 0)
    unused = tl.where(is_last, 8 * padding, 0).to(tl.int64)
    value = ((value << unused).to(tl.uint64, bitcast=True) >> unused.to(tl.uint64)).to(
        tl.int64, bitcast=True
    )
    tl.store(content + word, value, mask=is_last)
    if start < body:
        if ID_SIZE > 0:
            for byte in tl.static_range(8):
                position = (word - _HEADER) * 8 + byte
                which = position // ID_SIZE
                mask = (word >= _HEADER) & (which < id_count)
                whole = tl.load(ids + which, mask=mask, other=0).to(tl.int64)
                shift = (position % ID_SIZE * 8).to(tl.int64)
                value = value | (((whole >> shift) & 255) << (8 * byte))
        header = _header(word, sequence, place, total, FIRST)
        value = tl.where(word < _HEADER, header, value)
        tl.store(content + word, value, mask=word < body)
    tl.atomic_add(sums, tl.sum(value * (2 * word + 1).to(tl.int64)))
    # Whoever comes last finds the whole sum.
    if tl.atomic_add(sums + 1, 1) == tl.num_programs(0) - 1:
        tl.store(content + closing, tl.atomic_xchg(sums, 0))
        tl.atomic_xchg(sums + 1, 0)


@triton.jit(do_not_specialize=["sequence", "place", "total", "id_count", "last_id"])
def _check_payload(
    payload,
    ids,
    sums,
    mark,
    sequence,
    place,
    total,
    id_count,
    last_id,
    FIRST: tl.constexpr,
    ID_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    content = _as_words(payload)
    closing = total // 8 - 1
    program = tl.program_id(0)
    word = program * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(content + word, mask=word < closing, other=0)
    wrong = (word < _HEADER) & (value != _header(word, sequence, place, total, FIRST))
    faults = tl.sum(wrong.to(tl.int32))
    if ID_SIZE > 0:
        if program * IDS < id_count:
            which = program * IDS + tl.arange(0, IDS)
            carried = which < id_count
            found = tl.zeros([IDS], tl.int32)
            for byte in tl.static_range(ID_SIZE):
                place_of = payload + 8 * _HEADER + which * ID_SIZE + byte
                part = tl.load(place_of, mask=carried, other=0)
                found = found | (part.to(tl.int32) << (8 * byte))
            faults += tl.sum(((found < 0) | (found > last_id)).to(tl.int32))
            found = tl.minimum(tl.maximum(found, 0), last_id).to(tl.int32)
            tl.store(ids + which, found, mask=carried)
    due = tl.zeros([1], tl.int64) + sequence
    tl.atomic_min(mark + tl.zeros([1], tl.int32), due, mask=faults > 0)
    tl.atomic_add(sums, tl.sum(value * (2 * word + 1).to(tl.int64)))
    # Whoever comes last finds the whole sum.
    if tl.atomic_add(sums + 1, 1) == tl.num_programs(0) - 1:
        differs = tl.atomic_xchg(sums, 0) != tl.load(content + closing)
        tl.atomic_min(mark + tl.zeros([1], tl.int32), due, mask=differs)
        tl.atomic_xchg(sums + 1, 0)


_POINTERS = {"payload": "*u8", "ids": "*i32", "sums": "*i64"}
_SCALARS = dict.fromkeys(("sequence", "place", "total", "id_count"), "i32")

SPECIALISATIONS = [
    Specialisation(
        _seal_payload,
        {**_POINTERS, **_SCALARS, "padding": "i32"},
        {"FIRST": 1 << 32, "ID_SIZE": size, "BLOCK": _WORDS},
        {"num_warps": 8},
        divisible=tuple(_POINTERS),
    )
    for size in (0, 2, 3)
] + [
    Specialisation(
        _check_payload,
        {**_POINTERS, "mark": "*i64", **_SCALARS, "last_id": "i32"},
        {"FIRST": 1 << 32, "ID_SIZE": size, "BLOCK": _WORDS, "IDS": _IDS},
        {"num_warps": 8},
        divisible=(*_POINTERS, "mark"),
    )
    for size in (0, 2, 3)
]
