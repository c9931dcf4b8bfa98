# SPDX-License-Identifier: Apache-2.0
"""The kernels of residual vector quantisation: nearest entries, all statistics, one decoding."""

import pytest
import torch
from torch import Tensor

from mapl.codecs import CodecSettings, ResidualVQCodec
from mapl.codecs.bits import unpack_bits
from mapl.codecs.residual_search import add_statistics, chosen, normalised, reconstructed

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: n, w, G, R, K: what is usual, then odd numbers of rows, sizes of groups and codes.
SIZES = [
    (66, 8, 1, 4, 256),
    (1, 8, 1, 2, 256),
    (12, 9, 3, 2, 16),
    (5, 26, 2, 3, 2),
    (20, 10, 2, 1, 1024),
    (9, 64, 2, 2, 64),
]

every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")


def build(sizes, dtype: torch.dtype, device: torch.device, **more) -> ResidualVQCodec:
    _, width, groups, rounds, codes = sizes
    sync = more.pop("sync", "frozen")
    settings = CodecSettings(rvq_groups=groups, rvq_rounds=rounds, rvq_codes=codes, rvq_sync=sync)
    return ResidualVQCodec(width, dtype, settings, 4, **more).to(device)


def sample(sizes, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of magnitudes from 0.01 to 100, some that are zero, extreme or not finite, and twins."""
    count, width = sizes[:2]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    rows *= 10 ** (4 * torch.rand(count, 1, generator=generator) - 2)
    if count > 8:
        rows[1] = 0
        rows[2, -1], rows[3, 0], rows[4, 0] = float("nan"), float("inf"), -float("inf")
        rows[5] = rows[5].clamp(-1, 1) * torch.finfo(dtype).max
        rows[6] = rows[6].clamp(-1, 1) * torch.finfo(dtype).smallest_normal
        rows[8] = rows[7]
    rows = rows.to(dtype)
    rows[rows.abs() < torch.finfo(dtype).smallest_normal] = 0
    return rows


def codes_of(codec: ResidualVQCodec, body: Tensor, rows: int) -> Tensor:
    count = rows * codec.groups * codec.rounds
    data = codec.split(body, rows)["latents"]
    return unpack_bits(data, codec.code_bits, count).view(rows, codec.groups, codec.rounds).long()


@every_size
@every_dtype
def test_each_round_takes_the_nearest_entry(device, sizes, dtype):
    codec = build(sizes, dtype, device)
    rows = sample(sizes, dtype)
    body = torch.full((codec.body_bytes(len(rows)),), 255, dtype=torch.uint8, device=device)
    codec.encode_into(rows.to(device), 0, body)
    body, codebook = body.cpu(), codec.codebook.cpu()
    scales = codec.split(body, len(rows))["scales"].view(torch.bfloat16)
    expected, _ = normalised(rows)
    # Sums of squares in another order may round to the next of 256 steps of an octave.
    torch.testing.assert_close(
        scales.float(), expected.float(), rtol=2.0**-7, atol=0, equal_nan=True
    )
    assert ((scales == expected) | expected.isnan()).float().mean() > 0.95
    codes = codes_of(codec, body, len(rows))
    residual = torch.nan_to_num(rows.float() / scales.float()[:, None], nan=0.0)
    residual = residual.view(len(rows), codec.groups, codec.size).double()
    for number in range(codec.rounds):
        distances = (residual[:, :, None] - codebook[:, number].double()).norm(dim=3)
        taken = distances.gather(2, codes[..., number, None])[..., 0]
        best, place = distances.min(2)
        assert (taken <= best * (1 + 1e-5) + 1e-7).all()
        assert (place == codes[..., number]).float().mean() > 0.99
        residual = residual - chosen(codebook, codes, number).double()


@every_dtype
def test_of_equal_entries_the_first(device, dtype):
    sizes = (12, 16, 2, 2, 256)
    codec = build(sizes, dtype, device)
    codec.codebook.copy_(codec.codebook[:, :, :64].repeat(1, 1, 4, 1))
    body = codec.encode(sample(sizes, dtype).to(device), 0).cpu()
    assert int(codes_of(codec, body, 12).max()) < 64
    codec.codebook.zero_()
    body = codec.encode(sample(sizes, dtype).to(device), 0).cpu()
    assert not codes_of(codec, body, 12).any()


@every_size
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_statistics(device, sizes, dtype):
    """Of the codes that were taken, over two payloads: all rows but those that do not count."""
    codec = build(sizes, dtype, device)
    codebook = codec.codebook.cpu()
    counts = torch.zeros(codebook.shape[:3].numel(), dtype=torch.float64)
    sums = torch.zeros(len(counts), codec.size, dtype=torch.float64)
    for seed in range(2):
        rows = sample(sizes, dtype, seed)
        body = codec.encode(rows.to(device), 0).cpu()
        scales = codec.split(body, len(rows))["scales"].view(torch.bfloat16).float()
        vectors = torch.nan_to_num(rows.float() / scales[:, None], nan=0.0)
        vectors = vectors.view(len(rows), codec.groups, codec.size)
        weights = (scales.isfinite() & (scales > 0)).double()
        codes = codes_of(codec, body, len(rows))
        add_statistics(vectors.double(), codes, codebook.double(), weights, counts, sums)
    got_counts, got_sums = (part.cpu() for part in codec._split(codec.statistics()))
    assert torch.equal(got_counts.double().flatten(), counts)
    torch.testing.assert_close(
        got_sums.double().view_as(sums), sums, rtol=1e-5, atol=1e-5, check_dtype=False
    )
    before = codec.statistics().clone()
    codec.eval().encode(sample(sizes, dtype).to(device), 0)
    assert torch.equal(codec.statistics(), before)


@every_size
@every_dtype
def test_decoding_any_bytes(device, sizes, dtype):
    count, width = sizes[:2]
    codec = build(sizes, torch.float32, device, sends=False)
    generator = torch.Generator().manual_seed(width)
    body = torch.randint(0, 256, (codec.body_bytes(count),), generator=generator).to(torch.uint8)
    scales = codec.split(body, count)["scales"].view(torch.bfloat16)
    scales[::2] = torch.randn(len(scales[::2]), generator=generator).bfloat16()
    out = torch.full((count, width), 7.0, dtype=dtype, device=device)
    codec.decode([body.to(device)], out, 0)
    # By hand, in the order that is laid down: bit for bit.
    total = reconstructed(codec.codebook.cpu(), codes_of(codec, body, count)).view(count, width)
    limit = torch.finfo(dtype).max
    expected = (total * scales.float()[:, None]).clamp(-limit, limit)
    if dtype is torch.bfloat16 and device.type == "cpu":
        # Triton's interpreter rounds to bf16 toward zero, subnormal numbers wrongly.
        clear = (expected.abs() > 2.0**-120) | expected.isnan()
        expected = (expected.view(torch.int32) >> 16).to(torch.int16).view(dtype)
        out, expected = out[clear], expected[clear]
    out, expected = out.cpu(), expected.to(dtype)
    assert ((out == expected) | (out.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("sync", ["streaming", "full"])
def test_two_ends_learn_alike(device, dtype, sync):
    sizes = (40, 16, 2, 2, 256)
    sender, receiver = (build(sizes, dtype, device, sync=sync, sends=s) for s in (True, False))
    other = build(sizes, dtype, torch.device("cpu"), sync=sync, sends=False)
    for number in range(3):
        rows = sample(sizes, torch.float32, number).to(dtype)
        body = sender.encode(rows.to(device), number)
        out = torch.full_like(rows, 7.0, device=device)
        receiver.decode([body], out, number)
        assert torch.equal(sender.codebook, receiver.codebook)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAPL_OPS", "reference")
            expected = torch.empty(rows.shape)
            other.decode([body.cpu()], expected, number)
        finite = out.cpu().isfinite()
        assert torch.equal(finite[:, 0], normalised(rows)[0].isfinite())
        torch.testing.assert_close(out.cpu()[9:].float(), expected[9:], rtol=2.0**-7, atol=1e-6)
        sender.update(sender.statistics())
        receiver.update(None)
        other.update(None)
        if sender.whole_due():
            whole = sender.whole()
            receiver.take_whole(whole)
            other.take_whole(whole.cpu())


@pytest.mark.parametrize("wire", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["round-robin", "random"])
def test_streamed_entries(monkeypatch, device, wire, order):
    """Over the end of a cycle, where a code may be due twice, from two processes: as in torch."""
    settings = CodecSettings(
        rvq_groups=2, rvq_rounds=2, rvq_codes=8, rvq_sync_entries=3, rvq_order=order
    )
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(wire)
    results = {}
    for ops, place in (("triton", device), ("reference", torch.device("cpu"))):
        monkeypatch.setenv("MAPL_OPS", ops)
        ends = [
            ResidualVQCodec(6, wire, settings, 4, shards=2, shard=shard, sends=sends).to(place)
            for shard, sends in ((0, True), (1, True), (0, False))
        ]
        *senders, receiver = (end.eval() for end in ends)
        for sender in senders:
            generator = torch.Generator().manual_seed(7)
            sender.sums.copy_(torch.randn(sender.sums.shape, generator=generator))
            sender.counts.copy_(torch.rand(sender.counts.shape, generator=generator) - 0.5)
        results[ops] = []
        for number in range(4):
            bodies = [sender.encode(rows.to(place), number) for sender in senders]
            receiver.decode(bodies, torch.empty(8, 6, dtype=wire, device=place), number)
            assert all(torch.equal(end.codebook, receiver.codebook) for end in senders)
            carried = [end.split(b, 4)["codebook"] for end, b in zip(senders, bodies, strict=True)]
            results[ops] += [part.cpu().clone() for part in (*carried, receiver.codebook)]
    for left, right in zip(*results.values(), strict=True):
        assert torch.equal(left, right)


def test_large_groups_take_the_reference(device):
    sizes = (3, 66, 1, 2, 8)
    codec = build(sizes, torch.float32, device)
    rows = sample(sizes, torch.float32).to(device)
    assert not codec._fused(rows)
    out = torch.empty_like(rows)
    codec.decode_rows(codec.encode(rows, 0), out)
    assert out.isfinite().all()


def test_no_rows(device):
    codec = build((0, 8, 1, 2, 256), torch.float32, device)
    body = codec.encode(torch.empty(0, 8, device=device), 0)
    assert body.numel() == 0
    codec.decode_rows(body, torch.empty(0, 8, device=device))
