# SPDX-License-Identifier: Apache-2.0
"""Products whose result becomes codes, or whose operand comes from codes, without Z between."""

from functools import partial

import pytest
import torch

from mapl.codecs import CODECS, CodecEnd, CodecSettings, Role, build_codec
from mapl.ops.gathered import gathered_mm
from mapl.ops.gathered_operands import GatheredOperands

V = 60
# n, d, w, k: whole tiles, and not.
SIZES = [(130, 96, 128, 64), (7, 40, 64, 33), (65, 70, 72, 20), (3, 16, 10, 5)]
DTYPES = [torch.bfloat16, torch.float16]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
#: All but lowrank, which carries gradients: no products become those.
every_codec = pytest.mark.parametrize("name", [name for name in CODECS if name != "lowrank"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")


def build(name, width, dtype, device, role=Role.ACTIVATION, sends=True):
    settings = CodecSettings(topk=4, rvq_groups=2, rvq_codes=256, rvq_rounds=2)
    end = CodecEnd(role=role, width=width, dtype=dtype, seed=3, settings=settings, sends=sends)
    return build_codec(name, end).to(device)


def operands(n, a, k, m, dtype, device):
    left = torch.randn(n, a, device=device).to(dtype)
    table = torch.randn(V, k, device=device).to(dtype)
    ids = torch.randint(0, V, (n,), device=device)
    weight = (torch.randn(a + k, m, device=device) / (a + k) ** 0.5).to(dtype)
    return GatheredOperands(left, table, ids, weight)


@every_codec
@pytest.mark.parametrize("role", Role)
@every_dtype
@every_size
def test_bytes_are_those_of_the_product(name, role, dtype, size, device):
    n, d, w, k = size
    inputs = operands(n, d, k, w, dtype, device)
    bodies = []
    for fused in (True, False):
        codec = build(name, w, dtype, device, role)
        body = torch.full((codec.body_bytes(n),), 255, dtype=torch.uint8, device=device)
        if fused:
            z = codec.product_into(body, 5, inputs)
            assert z.shape == (n, w) and z.dtype == dtype
        else:
            codec.encode_into(gathered_mm(inputs), 5, body)
        bodies.append(body)
    assert torch.equal(*bodies)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_what_is_not_finite_shows_in_the_bytes(name, device):
    inputs = operands(130, 96, 64, 128, torch.bfloat16, device)
    left, table, ids, _ = inputs
    left[3, 5], left[4, 6], left[6] = float("nan"), float("inf"), 0
    table[ids[6]] = 0
    codec, receiver = (build(name, 128, torch.bfloat16, device, sends=s) for s in (True, False))
    body = torch.empty(codec.body_bytes(130), dtype=torch.uint8, device=device)
    codec.product_into(body, 0, inputs)
    out = torch.empty(130, 128, dtype=torch.bfloat16, device=device)
    receiver.decode([body], out, 0)
    assert out[3:5].isnan().all() and not out[6].any()
    assert out[:3].isfinite().all() and out[7:].isfinite().all()


@every_codec
@every_dtype
@every_size
def test_product_from_codes_is_that_of_what_they_decode_to(name, dtype, size, device):
    n, d, w, k = size
    rows = torch.randn(n, w, device=device).to(dtype)
    rows[0] = 0
    sender = build(name, w, dtype, device)
    body = sender.encode(rows, 2)
    _, table, ids, weight = operands(n, w, k, d, dtype, device)
    weight = torch.cat(
        [weight] * (1 + 512 // d), 1
    ).contiguous()  # more columns than a kernel takes
    decoded = torch.empty_like(rows)
    build(name, w, dtype, device, sends=False).decode([body], decoded, 2)
    expected = gathered_mm(GatheredOperands(decoded, table, ids, weight))
    z = torch.full_like(rows, float("nan"))
    receiver = build(name, w, dtype, device, sends=False)
    product = partial(receiver.product_from, [body], 2)
    assert torch.equal(product(GatheredOperands(z, table, ids, weight)), expected)
    assert torch.equal(z, decoded)
