# SPDX-License-Identifier: Apache-2.0
"""The kernels of the scaled codecs: the reference's bytes, and its numbers from any bytes."""

import pytest
import torch
from torch import Tensor

from mapl.codecs import Role
from mapl.codecs.scaled import Fp8Codec, Int4Codec, Int8Codec, ScaledCodec

pytest.importorskip("triton")

KINDS = [Fp8Codec, Int8Codec, Int4Codec]
#: Integers are read alike, whatever they carry.
FORMATS = [(kind, Role.ACTIVATION) for kind in KINDS] + [(Fp8Codec, Role.GRADIENT)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: n, w, g: whole groups in one tile and in several, then everything that is ragged.
WHOLE = [(9, 8, 4), (70, 64, 64), (1, 4096, 2048)]
RAGGED = [(1, 1, 64), (5, 65, 64), (9, 33, 6), (6, 24, 7), (5, 9, 1)]
SIZES = WHOLE + RAGGED

every_kind = pytest.mark.parametrize("kind", KINDS)
every_role = pytest.mark.parametrize("role", Role)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize(("count", "width", "group"), SIZES)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")


def sample(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Ordinary rows, and as many as there is room for that are zero, extreme, or not finite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    limits = torch.finfo(dtype)
    changes = [
        lambda row: row.zero_(),
        lambda row: row[width // 2 :].zero_(),
        lambda row: row.mul_(limits.smallest_normal * 64),
        lambda row: row.clamp_(-1, 1).mul_(limits.max),
        lambda row: row[width // 3 : width // 3 + 1].fill_(float("nan")),
        lambda row: row[-1:].fill_(-float("inf")),
        lambda row: row.fill_(-0.0),
        lambda row: row.copy_((row * 4).round() / 8),  # many ties
    ]
    for place, change in enumerate(changes[: count - 1]):
        change(rows[place + 1])
    return rows.to(dtype)


def reference(codec: ScaledCodec, rows: Tensor, number: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPL_OPS", "reference")
        return codec.encode(rows.cpu(), number)


def decoded(codec: ScaledCodec, body: Tensor, out: Tensor, ops: str) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPL_OPS", ops)
        codec.decode([body], out, 0)
    return out.cpu()


def same(left: Tensor, right: Tensor) -> bool:
    """Equal, zeros in sign too, where any NaN is a NaN."""
    bits = {4: torch.int32, 2: torch.int16}[left.dtype.itemsize]
    return bool(((left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())).all())


@every_kind
@every_role
@every_dtype
@every_size
def test_the_bytes_are_those_of_the_reference(device, kind, role, dtype, count, width, group):
    codec = kind(role, width, group, seed=9)
    rows = sample(count, width, dtype)
    if dtype is torch.bfloat16 and device.type == "cpu":
        rows[rows.abs() < 2.0**-126] = 0  # Triton's interpreter misreads subnormal bf16 numbers
    expected = reference(codec, rows, 3)
    out = (~expected).to(device)  # no byte of it is right
    codec.encode_into(rows.to(device), 3, out)
    assert torch.equal(out.cpu(), expected)


@every_kind
@every_role
def test_any_seed_and_number(device, kind, role):
    for seed, number in [(0, 0), (1, 2**31 - 1), (2**63 - 1, 5), (2**63, 6), (2**64 - 1, 7)]:
        codec = kind(role, 24, 8, seed)
        rows = sample(4, 24, torch.float32, seed=number)
        assert torch.equal(
            codec.encode(rows.to(device), number).cpu(), reference(codec, rows, number)
        )


@every_kind
@every_role
def test_every_number_that_rounds_near_a_code(device, kind, role):
    """All codes, the halves between them and the fp32 numbers beside those, either sign."""
    codec = kind(role, 64, 64, seed=1)
    body = torch.arange(256, dtype=torch.uint8)
    codes = codec._from_codes(body, 256 if codec.bits == 8 else 512)
    codes = codes[codes.isfinite() & (codes.abs() <= codec.largest_code)].sort().values.unique()
    halves = (codes[1:] + codes[:-1]) / 2
    points = torch.cat([codes, halves])
    beside = [points.nextafter(torch.full_like(points, end)) for end in (-1e9, 1e9)]
    points = torch.cat([points, *beside]).clamp(-codec.largest_code, codec.largest_code)
    lines = torch.nn.functional.pad(points, (0, -len(points) % 63)).view(-1, 63)
    rows = torch.cat([torch.full((len(lines), 1), codec.largest_code), lines], 1)  # s = 1
    assert torch.equal(codec.encode(rows.to(device), 2).cpu(), reference(codec, rows, 2))


@pytest.mark.parametrize(("kind", "role"), FORMATS)
@every_dtype
@every_size
def test_decoding_any_bytes(device, kind, role, dtype, count, width, group):
    """All bytes at all, what no sender makes among them."""
    codec = kind(role, width, group, seed=9)
    generator = torch.Generator().manual_seed(width)
    body = torch.randint(0, 256, (codec.body_bytes(count),), generator=generator).to(torch.uint8)
    scales = codec.split(body, count)["scales"].view(torch.bfloat16)
    scales[::2] = torch.rand(len(scales[::2]), generator=generator).bfloat16()
    if dtype is torch.bfloat16 and device.type == "cpu":
        # The interpreter rounds to bf16 toward zero, subnormal numbers wrongly.
        scales.abs_().clamp_(2.0**-100, 2.0**100)
        limit = torch.finfo(dtype).max
        exact = decoded(codec, body, torch.empty(count, width), "reference").clamp(-limit, limit)
        expected = (exact.view(torch.int32) >> 16).to(torch.int16).view(dtype)
    else:
        expected = decoded(codec, body, torch.empty(count, width, dtype=dtype), "reference")
    out = torch.full((count, width), float("nan"), dtype=dtype, device=device)
    assert same(decoded(codec, body.to(device), out, "triton"), expected)


def test_layout_does_not_matter(device):
    codec = Int4Codec(Role.GRADIENT, 28, 14, seed=2)
    rows = sample(28, 6, torch.float32).t()
    assert torch.equal(codec.encode(rows.to(device), 0).cpu(), reference(codec, rows, 0))
    body = codec.encode(rows.to(device), 0)
    wide = torch.full((28, 6), 7.0, device=device).t()
    assert not wide.is_contiguous()
    assert same(
        decoded(codec, body, wide, "triton"),
        decoded(codec, body.cpu(), torch.empty(6, 28), "reference"),
    )


@every_kind
def test_no_rows(device, kind):
    codec = kind(Role.GRADIENT, 8, 4, seed=2)
    body = codec.encode(torch.empty(0, 8, device=device), 0)
    assert body.numel() == 0
    codec.decode([body], torch.empty(0, 8, device=device), 0)
