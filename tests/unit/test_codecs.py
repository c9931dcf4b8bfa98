# SPDX-License-Identifier: Apache-2.0
"""Codecs: one suite over all of them, then what the simple ones do alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from mapl.codecs import (
    CODECS,
    Codec,
    CodecEnd,
    CodecSettings,
    DtypeCodec,
    Role,
    TopKCodec,
    build_codec,
)
from mapl.codecs.casting import bf16_nearest, bf16_up
from mapl.codecs.scaled import Fp8Codec, Int4Codec, Int8Codec, ScaledCodec
from mapl.config import CodecName

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 28, 64, 65, 128]
SCALED = {"fp8": Fp8Codec, "int8": Int8Codec, "int4": Int4Codec}
SETTINGS = CodecSettings(rvq_codes=16, rvq_rounds=2)

every_codec = pytest.mark.parametrize("name", CODECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_role = pytest.mark.parametrize("role", Role)
#: lowrank is for gradients alone.
every_use = pytest.mark.parametrize(
    ("name", "role"),
    [
        (name, role)
        for name in CODECS
        for role in Role
        if name != "lowrank" or role is Role.GRADIENT
    ],
    ids=str,
)


def build(name: str, role: Role, width: int, dtype: torch.dtype, **more) -> Codec:
    settings = replace(SETTINGS, topk=min(5, width), lowrank_q=1)
    end = CodecEnd(role=role, width=width, dtype=dtype, seed=5, settings=settings, **more)
    return build_codec(name, end)


def usual_role(name: str) -> Role:
    """What a codec can carry."""
    return Role.GRADIENT if name == "lowrank" else Role.ACTIVATION


def pair(name: str, role: Role, width: int, dtype: torch.dtype) -> tuple[Codec, Codec]:
    """Sender and receiver."""
    sender, receiver = (build(name, role, width, dtype, sends=sends) for sends in (True, False))
    return sender, receiver


def sample(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian rows of magnitudes from 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    return (torch.randn(rows, width, generator=generator) * scales).to(dtype)


def there_and_back(sender: Codec, receiver: Codec, rows: Tensor, number: int = 0) -> Tensor:
    out = torch.full_like(rows, float("nan"))
    receiver.decode([sender.encode(rows, number)], out, number)
    return out


def bound(codec: Codec, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codec states, and the rounding of the receiving dtype: fp64 [n, w]."""
    stated = codec.error_bound(rows)
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    rounding = (rows.double().abs() + stated) * limits.eps / 2 + smallest / 2
    return stated if isinstance(codec, (DtypeCodec, TopKCodec)) else stated + rounding


# --- every codec ----------------------------------------------------------------------------------


@every_use
@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_are_as_declared_and_errors_within_the_bound(name, role, dtype, width):
    for count in (1, 3, 64):
        sender, receiver = pair(name, role, width, dtype)
        for number in range(2):
            rows = sample(count, width, dtype)
            limits = bound(sender, rows, dtype)
            body = sender.encode(rows, number)
            assert body.dtype == torch.uint8 and body.ndim == 1
            parts = sender.parts(count)
            assert parts == receiver.parts(count)
            assert body.numel() == sender.body_bytes(count) == sum(parts.values())
            assert {k: v.numel() for k, v in sender.split(body, count).items()} == parts
            assert torch.equal(rows, sample(count, width, dtype)), "the input was changed"
            out = torch.full_like(rows, float("nan"))
            receiver.decode([body], out, number)
            error = (out.double() - rows.double()).abs()
            assert (error <= limits).all(), float((error - limits).max())


@pytest.mark.parametrize(("name", "share"), [("fp8", 0.04), ("int8", 0.01), ("int4", 0.16)])
@every_role
@every_dtype
def test_the_error_is_as_small_as_the_bits_allow(name, share, role, dtype):
    """Bounds that are too wide would hide a codec that wastes its bits."""
    sender, receiver = pair(name, role, 128, dtype)
    rows = sample(64, 128, dtype)
    error = there_and_back(sender, receiver, rows).double() - rows.double()
    twice = 2 if role is Role.GRADIENT else 1  # random rounding, and e5m2's one bit less
    assert (error.norm(dim=1) < share * twice * rows.double().norm(dim=1)).all()


@every_use
@every_dtype
def test_the_same_input_and_number_give_the_same_bytes(name, role, dtype):
    rows = sample(5, 28, dtype)
    first, second = (build(name, role, 28, dtype) for _ in range(2))
    body = first.encode(rows, 3)
    assert torch.equal(body, second.encode(rows, 3))
    bodies = [body, first.encode(rows, 3)]
    if name == "lowrank":  # what the first left out is in the second
        assert not torch.equal(*bodies) and torch.equal(bodies[1], second.encode(rows, 4))
        return
    assert torch.equal(*bodies)
    random = name in ("int8", "int4") and role is Role.GRADIENT
    if name != "rvq":
        assert torch.equal(bodies[0], second.encode(rows, 4)) != random


@every_use
@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_arrive_as_finite(name, role, dtype, value):
    width, place = 160, 70
    sender, receiver = pair(name, role, width, dtype)
    rows = sample(3, width, dtype)
    rows[1, place] = value
    out = there_and_back(sender, receiver, rows)
    if name == "pipeline":
        assert torch.equal(out.view(torch.uint8), rows.view(torch.uint8))
        return
    spoilt = torch.zeros(3, width, dtype=torch.bool)
    if name == "topk":
        spoilt[1, place] = True
        assert torch.equal(out[spoilt].view(torch.uint8), rows[spoilt].view(torch.uint8))
        out[spoilt] = float("nan")
    elif name in ("rvq", "lowrank"):
        spoilt[1] = True
    else:
        spoilt[1, 64:128] = True
    assert torch.equal(out.isnan(), spoilt)
    assert out[~spoilt].isfinite().all()
    # A payload later all is well again.
    rows[1, place] = 1.0
    assert there_and_back(sender, receiver, rows, 1).isfinite().all()


MAGNITUDES = {
    torch.float32: [1e-45, 1e-39, 2.0**-126, 1e-30, 1e30, torch.finfo(torch.float32).max],
    torch.bfloat16: [1e-40, 2.0**-126, 1e-30, 1e30, torch.finfo(torch.bfloat16).max],
    torch.float16: [6e-8, 6e-5, 65504.0],
}


@every_use
@every_dtype
def test_extreme_magnitudes_stay_finite_and_within_the_bound(name, role, dtype):
    sender, receiver = pair(name, role, 65, dtype)
    shape = sample(4, 65, torch.float32).clamp(-1, 1)
    shape[0] = 1  # all at the limit
    for number, size in enumerate(MAGNITUDES[dtype]):
        rows = (shape * size).to(dtype)
        rows[3, ::2] = 1.0  # beside ordinary numbers
        assert rows.isfinite().all()
        limits = bound(sender, rows, dtype)
        out = there_and_back(sender, receiver, rows, number)
        assert out.isfinite().all(), size
        error = (out.double() - rows.double()).abs()
        assert (error <= limits).all(), size


@every_use
@every_dtype
def test_zeros_arrive_as_zeros(name, role, dtype):
    sender, receiver = pair(name, role, 128, dtype)
    rows = sample(4, 128, dtype)
    rows[1] = 0
    rows[2, 64:] = 0
    out = there_and_back(sender, receiver, rows)
    assert (out[1] == 0).all()
    if name in ("pipeline", *SCALED):
        assert (out[2, 64:] == 0).all()
    assert (out[0] != 0).any() and (out[3] != 0).any()


@every_use
def test_bodies_of_several_senders_are_decoded_in_order(name, role):
    shards, rows = 3, sample(12, 28, torch.bfloat16)
    inputs = rows.chunk(shards)
    senders = [
        build(name, role, 28, torch.bfloat16, shards=shards, shard=shard) for shard in range(shards)
    ]
    receiver = build(name, role, 28, torch.bfloat16, shards=shards, sends=False)
    for number in range(3):
        both = list(zip(senders, inputs, strict=True))
        limits = torch.cat([bound(sender, part, torch.bfloat16) for sender, part in both])
        bodies = [sender.encode(part, number) for sender, part in both]
        assert {body.numel() for body in bodies} == {receiver.body_bytes(4)}
        out = torch.full_like(rows, float("nan"))
        receiver.decode(bodies, out, number)
        error = (out.double() - rows.double()).abs()
        assert (error <= limits).all()


def test_senders_round_independently():
    rows = sample(4, 64, torch.float32)
    bodies = [
        build("int8", Role.GRADIENT, 64, torch.float32, sender=sender).encode(rows, 0)
        for sender in range(2)
    ]
    assert not torch.equal(*bodies)


@every_codec
@every_dtype
def test_autograd_ends_here_and_layout_does_not_matter(name, dtype):
    sender, receiver = pair(name, usual_role(name), 28, dtype)
    rows = sample(28, 6, dtype).t()
    assert not rows.is_contiguous()
    expected = there_and_back(*pair(name, usual_role(name), 28, dtype), rows.contiguous())
    body = sender.encode(rows.requires_grad_(), 0)
    assert not body.requires_grad
    out = torch.empty(6, 28, dtype=dtype, requires_grad=True)
    receiver.decode([body], out, 0)
    assert out.is_leaf and torch.equal(out, expected)


@every_codec
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_changes_nothing(name, cast):
    rows = sample(4, 64, torch.float32)
    expected = there_and_back(*pair(name, usual_role(name), 64, torch.float32), rows)
    sender, receiver = pair(name, usual_role(name), 64, torch.float32)
    out = there_and_back(torch.nn.ModuleList([sender]).to(cast)[0], receiver.type(cast), rows)
    assert torch.equal(out, expected)


def test_only_codebooks_and_the_first_guess_of_lowrank_are_saved():
    for name in CODECS:
        state = build(name, usual_role(name), 64, torch.float32).state_dict()
        assert bool(state) == (name in ("rvq", "lowrank"))


# --- the table ------------------------------------------------------------------------------------


def test_names():
    assert (
        list(CODECS)
        == ["pipeline", "fp8", "int8", "int4", "rvq", "topk", "lowrank"]
        == [*get_args(CodecName)]
    )
    with pytest.raises(ValueError, match="zip is unknown; use one of pipeline, fp8, int8"):
        build("zip", Role.ACTIVATION, 8, torch.float32)
    with pytest.raises(ValueError, match="shard 2 is not one of 2"):
        build("int8", Role.ACTIVATION, 8, torch.float32, shards=2, shard=2)
    with pytest.raises(ValueError, match="--mapl-codec-group-size 0"):
        Int8Codec(Role.ACTIVATION, 8, 0, seed=0)


def test_pipeline_does_not_round_silently():
    codec = DtypeCodec(torch.bfloat16, 7)
    assert codec.parts(3) == {"latents": 42}
    with pytest.raises(ValueError, match="float32"):
        codec.encode(torch.zeros(1, 7), 0)


# --- scales and rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("rows", "width", "scales"), [(3, 64, 3), (3, 65, 6), (1, 7, 1), (5, 1, 5), (2, 128, 4)]
)
def test_bytes_of_the_scaled_codecs(name, rows, width, scales):
    codec = build(name, Role.GRADIENT, width, torch.bfloat16)
    latents = -(-rows * width // 2) if name == "int4" else rows * width
    assert list(codec.parts(rows).items()) == [("scales", 2 * scales), ("latents", latents)]


def test_bodies_to_the_byte():
    """Written out by hand, for whoever writes another implementation."""
    row = torch.tensor([[1.0, -127.0, 0.5, 1.5, 0.0, 63.4]])
    body = Int8Codec(Role.ACTIVATION, 6, 64, 0).encode(row, 0)
    assert body.tolist() == [0x80, 0x3F, 1, 0x81, 0, 2, 0, 63]  # bf16 1.0, low byte first
    row = torch.tensor([[7.0, -7.0, 0.5, 1.5, 14.0]])
    body = Int4Codec(Role.ACTIVATION, 5, 4, 0).encode(row, 0)
    #  scales 1 and 2; codes 15 1 8 10 | 15, low half first, four zero bits at the end
    assert body.tolist() == [0x80, 0x3F, 0x00, 0x40, 0x1F, 0xA8, 0x0F]
    row = torch.tensor([[448.0, -1.0, 0.0]])
    body = Fp8Codec(Role.ACTIVATION, 3, 64, 0).encode(row, 0)
    assert body.tolist() == [0x80, 0x3F, 0x7E, 0xB8, 0x00]
    row = torch.tensor([[1.0, float("nan"), 2.0, 127.0]])
    body = Int8Codec(Role.ACTIVATION, 4, 2, 0).encode(row, 0)
    assert body.tolist() == [0xC0, 0x7F, 0x80, 0x3F, 0, 0, 2, 127]  # NaN, and codes of 0 beside it
    row = torch.tensor([[57344.0, -1.0, 0.0]])
    body = Fp8Codec(Role.GRADIENT, 3, 64, 0).encode(row, 0)
    assert body.tolist() == [0x80, 0x3F, 0x7B, 0xBC, 0x00]


@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_activations_are_rounded_to_the_nearest(kind):
    codec = kind(Role.ACTIVATION, 64, 16, seed=0)
    rows = sample(32, 64, torch.float32)
    body = codec.encode(rows, 0)
    scales = codec.split(body, 32)["scales"].view(torch.bfloat16).double().view(32, 4, 1)
    groups = rows.double().view(32, 4, 16)
    exact = groups.abs().amax(2, keepdim=True) / codec.largest_code
    assert (scales >= exact).all() and (scales < exact * (1 + 2**-7)).all()
    out = torch.empty_like(rows)
    codec.decode([body], out, 0)
    ratio = groups / scales
    clear = (ratio - ratio.floor() - 0.5).abs() > 1e-5
    got = out.double().view(32, 4, 16) / scales
    assert torch.equal(got[clear], ratio.round()[clear]) and clear.float().mean() > 0.99


@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_gradients_are_rounded_without_bias(kind):
    payloads = 1500
    codec = kind(Role.GRADIENT, 33, 16, seed=1)
    rows = sample(3, 33, torch.float32)
    scales = codec.split(codec.encode(rows, 0), 3)["scales"].view(torch.bfloat16).double()
    scales = scales.view(3, 3).repeat_interleave(16, 1)[:, :33]
    total, out = torch.zeros(3, 33, dtype=torch.float64), torch.empty_like(rows)
    for number in range(payloads):
        codec.decode([codec.encode(rows, number)], out, number)
        total += out.double()
    up = (rows.double() / scales) % 1
    deviation = scales * (up * (1 - up) / payloads).sqrt()
    error = (total / payloads - rows.double()).abs()
    assert (error <= 5 * deviation + 1e-5 * scales).all(), float((error / scales).max())
    # To the nearest, most of these numbers would miss by more.
    nearest = torch.minimum(up, 1 - up) * scales
    assert (nearest > 5 * deviation).float().mean() > 0.8


def largest_error_in_steps(codec: ScaledCodec, rows: Tensor) -> float:
    body, out = codec.encode(rows, 0), torch.empty_like(rows)
    codec.decode([body], out, 0)
    scales = codec.split(body, len(rows))["scales"].view(torch.bfloat16).double()
    return float(((out.double() - rows.double()).abs() / scales[:, None]).max())


@pytest.mark.parametrize("kind", [Int8Codec, Int4Codec])
def test_stochastic_rounding_moves_by_less_than_a_step(kind):
    rows = sample(500, 16, torch.float32)
    assert 0.5 < largest_error_in_steps(kind(Role.GRADIENT, 16, 16, 0), rows) < 1
    assert 0.49 < largest_error_in_steps(kind(Role.ACTIVATION, 16, 16, 0), rows) < 0.5001


def bf16_steps(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16).to(torch.int32)


@pytest.mark.parametrize(
    ("cast", "check"),
    [
        (bf16_nearest, lambda got, x: torch.equal(got, x.to(torch.bfloat16))),
        (
            bf16_up,
            lambda got, x: bool(
                (got.double() >= x.double()).all()
                and ((bf16_steps(got) - 1).to(torch.int16).view(torch.bfloat16).double() < x).all()
            ),
        ),
    ],
)
def test_casts_to_bf16(cast: Callable[[Tensor], Tensor], check: Callable[[Tensor, Tensor], bool]):
    bits = torch.randint(1, 0x7F7F0000, (20000,), generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(1, 0x7F7F, dtype=torch.int32) << 16) + 0x8000
    exact = torch.arange(1, 0x7F7F, dtype=torch.int32) << 16
    values = torch.cat([bits.to(torch.int32), ties, exact]).view(torch.float32)
    assert check(cast(values), values)
    special = cast(torch.tensor([0.0, float("inf"), float("nan")]))
    assert bf16_steps(special).tolist() == [0, 0x7FC0, 0x7FC0]
    assert cast(torch.tensor(torch.finfo(torch.float32).max)).isfinite()
