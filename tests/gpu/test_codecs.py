# SPDX-License-Identifier: Apache-2.0
"""Codecs on a GPU: the same bytes and numbers as on the CPU, and no wait for the device."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mapl.codecs import CODECS, Codec, CodecEnd, CodecSettings, ResidualVQCodec, Role, build_codec
from mapl.codecs.bits import pack_bits, unpack_bits
from mapl.codecs.codebook_stream import CodebookStream
from mapl.codecs.counter_random import gaussian, hash64, uniform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [7, 65, 256]
ROWS = 130

every_codec = pytest.mark.parametrize("name", CODECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_role = pytest.mark.parametrize("role", Role)
#: lowrank is for gradients alone.
USES = [
    (name, role) for name in CODECS for role in Role if name != "lowrank" or role is Role.GRADIENT
]
every_use = pytest.mark.parametrize(("name", "role"), USES, ids=str)


def build(name: str, role: Role, width: int, dtype: torch.dtype, device: str, **more) -> Codec:
    end = CodecEnd(
        role=role,
        width=width,
        dtype=dtype,
        seed=5,
        settings=CodecSettings(topk=7, lowrank_q=5, rvq_order=more.pop("order", "round-robin")),
        **more,
    )
    return build_codec(name, end).to(device)


def sample(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Ordinary rows, and some that are zero, tiny, huge, or not finite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, width, generator=generator)
    limits = torch.finfo(dtype)
    rows[1] = 0
    rows[2] *= limits.smallest_normal
    rows[3] = rows[3].clamp(-1, 1) * limits.max / 256
    rows[4, 3], rows[5, 3] = float("nan"), float("inf")
    return rows.to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal, where NaN equals NaN whatever its bits."""
    left, right = left.cpu(), right.cpu()
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


@contextmanager
def no_waiting() -> Generator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_use
@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_cpu_encodes_the_gpu_decodes_alike(name, role, dtype, width):
    rows, outs = sample(width, dtype), []
    body = build(name, role, width, dtype, "cpu").encode(rows, 3)
    for device in ("cpu", "cuda"):
        receiver = build(name, role, width, dtype, device, sends=False)
        out = torch.full_like(rows, 7.0, device=device)
        receiver.decode([body.to(device)], out, 3)
        outs.append(out)
    if name == "lowrank":  # a product, whose sums devices round each in its own way
        assert same(*(out.isnan() for out in outs))
        on_cpu, on_gpu = (out.cpu().nan_to_num().double() for out in outs)
        tolerance = 4 * torch.finfo(dtype).eps * on_cpu.norm(dim=1, keepdim=True)
        assert ((on_cpu - on_gpu).abs() <= tolerance).all()
    else:
        assert same(*outs)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("rvq", "lowrank")])
@every_role
@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_are_those_of_the_cpu(name, role, dtype, width):
    rows = sample(width, dtype)
    on_cpu, on_gpu = (
        build(name, role, width, dtype, device).encode(rows.to(device), 3).cpu()
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu, on_gpu)


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_low_rank_are_factorised_alike(dtype, width):
    """Factorisations round otherwise, and may differ in signs that their product does not show."""
    ends = [build("lowrank", Role.GRADIENT, width, dtype, device) for device in ("cpu", "cuda")]
    for number in range(3):
        rows, outs = torch.randn(ROWS, width).to(dtype), []
        rows[4, 3] = float("nan")
        for codec, device in zip(ends, ("cpu", "cuda"), strict=True):
            out = torch.empty(ROWS, width, dtype=dtype, device=device)
            codec.decode_rows(codec.encode(rows.to(device), number), out)
            outs.append(out.float().cpu())
        assert outs[0][4].isnan().all() and same(*(out.isnan() for out in outs))
        on_cpu, on_gpu = (out.nan_to_num() for out in outs)
        assert (on_cpu - on_gpu).norm() < (number + 1) * 10 * torch.finfo(dtype).eps * on_cpu.norm()


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_codebooks_learn_alike(dtype, width):
    """GEMMs and means sum in another order, so that a tie may fall the other way now and then."""
    ends = [build("rvq", Role.ACTIVATION, width, dtype, device) for device in ("cpu", "cuda")]
    for number in range(3):
        rows, outs = sample(width, dtype, seed=number), []
        for codec in ends:
            assert isinstance(codec, ResidualVQCodec)
            device = codec.codebook.device
            out = torch.empty(ROWS, width, device=device)
            codec.decode_rows(codec.encode(rows.to(device), number), out)
            outs.append(out[6:].cpu())
        assert (outs[0] - outs[1]).norm() < 0.05 * outs[0].norm()
        for codec in ends:
            codec.update(codec.statistics())
            codec.whole()
    # All finite rows but the one of zeros were counted, and in the same places but for a few.
    counts = [codec.counts.cpu() for codec in ends]
    torch.testing.assert_close(counts[0].sum(2), torch.full_like(counts[0].sum(2), ROWS - 3.0))
    assert (counts[0] - counts[1]).abs().sum() < 0.1 * counts[0].sum()


@every_use
@pytest.mark.parametrize("order", ["round-robin", "random"])
def test_nothing_waits_for_the_device(name, role, order):
    dtype, width, shards = torch.bfloat16, 256, 2
    senders = [
        build(name, role, width, dtype, "cuda", order=order, shards=shards, shard=shard)
        for shard in range(shards)
    ]
    receiver = build(name, role, width, dtype, "cuda", order=order, shards=shards, sends=False)
    rows = sample(width, dtype).cuda()
    out = torch.empty_like(rows)
    with no_waiting():
        for number in range(130):  # past the end of a cycle of 256 codes
            bodies = [
                s.encode(part, number) for s, part in zip(senders, rows.chunk(2), strict=True)
            ]
            receiver.decode(bodies, out, number)
        if name == "rvq":
            for sender in senders:
                sender.update(sender.statistics())
            receiver.update(None)
            assert receiver.whole_due()
            # Each sender has seen rows of its own, so it is the first one's that counts here.
            receiver.take_whole(senders[0].whole())
    if name == "rvq":
        assert torch.equal(senders[0].codebook, receiver.codebook)
    assert same(out[6:].isnan(), torch.zeros_like(out[6:], dtype=torch.bool))


@pytest.mark.parametrize("codes", [2, 16, 65536])
def test_both_ends_agree_on_the_cycle(codes):
    stream = CodebookStream(codes, 1, 2, 0, "random", seed=3)
    for number in (0, 1, codes // 2 - 1, codes // 2):
        with no_waiting():
            due = stream.due(number, torch.device("cuda"))
        assert torch.equal(due.cpu(), stream.due(number, torch.device("cpu")))


@pytest.mark.parametrize("make", [hash64, uniform, gaussian])
def test_random_numbers_are_those_of_the_cpu(make):
    on_cpu, on_gpu = (make(2**63 + 5, 1001, torch.device(device)) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_bytes_are_those_of_the_cpu(bits):
    codes = torch.randint(0, 2**bits, (1001,), generator=torch.Generator().manual_seed(0))
    data = pack_bits(codes.cuda(), bits)
    assert torch.equal(data.cpu(), pack_bits(codes, bits))
    assert torch.equal(unpack_bits(data, bits, 1001).cpu().long(), codes)
