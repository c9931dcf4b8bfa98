# SPDX-License-Identifier: Apache-2.0
"""What top-k sparsification does alone; tests/unit/test_codecs.py has what all codecs do."""

import math

import pytest
import torch
from torch import Tensor

from mapl.codecs import CodecEnd, CodecSettings, Role, TopKCodec, build_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def there_and_back(rows: Tensor, kept: int) -> Tensor:
    """Through two ends of a codec."""
    ends = [TopKCodec(rows.dtype, rows.shape[1], kept) for _ in range(2)]
    out = torch.full_like(rows, 7.0)
    ends[1].decode([ends[0].encode(rows, 0)], out, 0)
    return out


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def decoded(row: list[float], kept: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """One row there and back."""
    return there_and_back(torch.tensor([row], dtype=dtype), kept)[0].tolist()


def naive(rows: Tensor, kept: int) -> Tensor:
    """Number by number."""
    out = torch.zeros_like(rows)
    for row, result in zip(rows, out, strict=True):
        order = sorted(range(len(row)), key=lambda column: (-abs(float(row[column])), column))
        for column in order[:kept]:
            result[column] = row[column]
    return out


@every_dtype
@pytest.mark.parametrize(("width", "kept"), [(1, 1), (7, 3), (65, 1), (128, 40), (300, 299)])
def test_equals_the_definition(dtype, width, kept):
    """With many ties: half the rows hold few different magnitudes."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(12, width, generator=generator)
    rows[:6] = rows[:6].mul(1.5).round()
    rows[5] *= 0.0
    rows = rows.to(dtype)
    assert torch.equal(bits(there_and_back(rows, kept)), bits(naive(rows, kept)))


@every_dtype
def test_the_lower_column_wins_a_tie(dtype):
    assert decoded([1, -2, 2, 2, 0.5, -2], 2, dtype) == [0, -2, 2, 0, 0, 0]
    assert decoded([1, 1, 1, 1], 3, dtype) == [1, 1, 1, 0]
    assert decoded([0, 0, 0], 2, dtype) == [0, 0, 0]


@every_dtype
def test_nan_is_the_largest_and_inf_comes_next(dtype):
    nan, inf = math.nan, math.inf
    out = decoded([9, inf, 1, nan, -inf], 1, dtype)
    assert math.isnan(out[3]) and [*out[:3], out[4]] == [0, 0, 0, 0]
    out = decoded([9, -inf, 1, nan, inf], 2, dtype)
    assert math.isnan(out[3]) and [*out[:3], out[4]] == [0, -inf, 0, 0]
    out = decoded([nan, 1, -nan, nan], 2, dtype)
    assert math.isnan(out[0]) and math.isnan(out[2]) and [out[1], out[3]] == [0, 0]
    assert decoded([65504, -inf, 0], 1, dtype) == [0, -inf, 0]


def test_no_nan_is_above_another():
    patterns = torch.tensor([[0x7F800001, 0x7FFFFFFF, -1, 0x7F800000]], dtype=torch.int32)
    out = there_and_back(patterns.view(torch.float32), 2).view(torch.int32)
    assert out.tolist() == [[0x7F800001, 0x7FFFFFFF, 0, 0]]


@every_dtype
def test_numbers_below_the_normal_ones_are_told_apart(dtype):
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps
    assert decoded([tiny, 0, -3 * tiny, 2 * tiny], 2, dtype) == [0, 0, -3 * tiny, 2 * tiny]


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 65])
def test_all_of_a_row_is_exact(dtype, width):
    rows = torch.randn(9, width).to(dtype)
    rows[1, 0], rows[2, 0], rows[3, 0] = math.nan, -math.inf, -0.0
    assert torch.equal(bits(there_and_back(rows, width)), bits(rows))


def test_a_body_to_the_byte():
    """Written out by hand, for whoever writes another implementation."""
    row = torch.zeros(2, 300, dtype=torch.bfloat16)
    row[0, 258], row[0, 3], row[1, 299] = 1.0, -2.0, 1.0
    codec = TopKCodec(torch.bfloat16, 300, 2)
    body = codec.encode(row, 0)
    #  values -2 1 | 1 0 in the order of their columns: 3 258 | 0 299
    assert body.tolist() == [
        *(0x00, 0xC0, 0x80, 0x3F, 0x00, 0x00, 0x80, 0x3F),
        *(3, 0, 2, 1, 0, 0, 43, 1),
    ]  # fmt: skip
    assert list(codec.parts(2).items()) == [("latents", 8), ("indices", 8)]
    assert list(TopKCodec(torch.float32, 300, 2).parts(5).items()) == [
        ("latents", 40),
        ("indices", 20),
    ]


def test_columns_ascend():
    rows = torch.randn(50, 200)
    codec = TopKCodec(torch.float32, 200, 30)
    data = codec.split(codec.encode(rows, 0), 50)["indices"]
    columns = data.view(torch.int16).view(50, 30)
    assert (columns.diff(dim=1) > 0).all()


def test_the_widest_rows():
    rows = torch.zeros(2, 65536, dtype=torch.bfloat16)
    rows[0, 65535], rows[0, 40000], rows[1, 32768] = 3.0, -1.0, 2.0
    assert torch.equal(there_and_back(rows, 2), rows)


@every_dtype
def test_the_bound_is_what_is_lost(dtype):
    rows = torch.randn(20, 33).to(dtype)
    codec = TopKCodec(dtype, 33, 8)
    error = (there_and_back(rows, 8).double() - rows.double()).abs()
    assert torch.equal(codec.error_bound(rows), error)
    least = rows.double().abs().topk(8).values[:, -1:]
    assert ((error == 0).sum(1) == 8).all() and (error <= least).all()


def test_columns_beyond_the_row_write_nowhere_else():
    codec = TopKCodec(torch.float32, 5, 2)
    body = codec.encode(torch.randn(3, 5), 0)
    body[-12:] = 255
    memory = torch.full((5, 5), 7.0)
    codec.decode([body], memory[1:4], 0)
    assert (memory[[0, 4]] == 7).all() and not memory[1:4, :4].any()


def test_other_dtypes_are_refused():
    codec = TopKCodec(torch.bfloat16, 7, 2)
    with pytest.raises(ValueError, match=r"float32 was given to a codec for torch\.bfloat16"):
        codec.encode(torch.zeros(1, 7), 0)
    body = codec.encode(torch.zeros(1, 7, dtype=torch.bfloat16), 0)
    with pytest.raises(ValueError, match=r"float16 was given to a codec for torch\.bfloat16"):
        codec.decode([body], torch.zeros(1, 7, dtype=torch.float16), 0)


@pytest.mark.parametrize(
    ("kept", "width", "message"),
    [
        (None, 8, "--mapl-topk is missing: .*give --mapl-topk K, or name another codec"),
        (0, 8, "--mapl-topk 0 must keep at least 1"),
        (9, 8, "--mapl-topk 9 exceeds the 8 numbers of a row; it is at most 8"),
        (4, 65537, "--mapl-topk 4: places in rows of 65537 numbers .* at most 65536"),
    ],
)
def test_errors_name_flag_value_and_remedy(kept, width, message):
    end = CodecEnd(
        role=Role.GRADIENT,
        width=width,
        dtype=torch.float32,
        seed=0,
        settings=CodecSettings(topk=kept),
    )
    with pytest.raises(ValueError, match=message):
        build_codec("topk", end)
