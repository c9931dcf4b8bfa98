# SPDX-License-Identifier: Apache-2.0
"""Channels and the ledger: both ends agree, and bytes declared are bytes sent."""

from dataclasses import replace

import pytest
import torch

from mapl import traffic
from mapl.channel import Channel, Share
from mapl.codecs import DtypeCodec
from mapl.parcel import ParcelChannel
from mapl.payload import Direction, PayloadLayout
from mapl.payload_guard import PayloadError, PayloadGuard
from mapl.traffic import Ledger


def ends(dtype: torch.dtype = torch.bfloat16, width: int = 7, *, ids: bool = True) -> list[Channel]:
    layout = PayloadLayout(0, Direction.FORWARD, vocab_size=2**16)
    return [Channel(layout, width, DtypeCodec(dtype, width), carries_ids=ids) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 5), (16, 2)])
def test_latents_and_ids_cross_unchanged(dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    sender, receiver = ends(dtype)
    ledger, guard = Ledger(), PayloadGuard()
    total = 0
    for _ in range(3):
        latent = torch.randn(*tokens, 7).to(dtype)
        latent[0, 0, 0], latent[0, 0, 1] = float("nan"), float("inf")
        ids = torch.randint(0, 60000, tokens)
        payload = sender.pack(latent, ids, ledger, uncompressed=1000)
        assert payload.numel() == receiver.layout_of(tokens).total_bytes
        total += payload.numel()
        out = torch.empty(*tokens, 7, dtype=dtype)
        got = receiver.unpack([payload], out, guard)
        assert torch.equal(out.view(torch.uint8), latent.view(torch.uint8))
        assert got is not None and torch.equal(got.long(), ids)
    report = traffic.report([ledger.sent])
    assert report["total"]["sent"] == total
    assert report["total"]["uncompressed"] == 3000
    assert report["total"]["ratio"] == 3000 / total
    assert report["total"]["payloads"] == 3


def test_a_lost_payload_is_seen() -> None:
    sender, receiver = ends(ids=False)
    ledger = Ledger()
    latent = torch.zeros(2, 1, 7, dtype=torch.bfloat16)
    sender.pack(latent, None, ledger, 0)
    second = sender.pack(latent, None, ledger, 0)
    with pytest.raises(PayloadError, match="payload 1 arrived"):
        receiver.unpack([second], torch.empty_like(latent), PayloadGuard())


def test_another_micro_batch_size_changes_the_size_on_both_ends() -> None:
    sender, receiver = ends()
    for tokens in ((4, 2), (4, 1), (4, 2)):
        latent = torch.randn(*tokens, 7).bfloat16()
        payload = sender.pack(latent, torch.zeros(tokens, dtype=torch.long), Ledger(), 0)
        receiver.unpack([payload], torch.empty_like(latent), PayloadGuard())


def test_layouts_are_kept_for_a_few_sizes_of_each_boundary() -> None:
    channel, fresh = ends()
    first = channel.layout_of((4, 2))
    assert channel.layout_of((4, 2)) is first
    for rows in range(1, 100):
        assert channel.layout_of((rows, 1)) == fresh.layout_of((rows, 1))
    assert len(channel._layouts) < 20
    channel.layout = replace(channel.layout, boundary=1)
    assert channel.layout_of((4, 2)) == replace(first, boundary=1)


def test_a_codec_does_not_round_silently() -> None:
    sender, _ = ends(torch.bfloat16, ids=False)
    with pytest.raises(ValueError, match="float32"):
        sender.pack(torch.zeros(1, 1, 7), None, Ledger(), 0)


@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_up_the_whole(count: int) -> None:
    """Tensor-parallel ranks that hold the same latents send a part each."""
    layout = PayloadLayout(0, Direction.FORWARD, vocab_size=2**16)
    latent, ids = torch.randn(3, 4, 7).bfloat16(), torch.randint(0, 2**16, (3, 4))
    ledger, payloads = Ledger(), []
    for index in range(count):
        share = Share(index, count)
        sender = Channel(layout, 7, DtypeCodec(torch.bfloat16, 7), carries_ids=True, share=share)
        payloads.append(sender.pack(latent, ids, ledger, uncompressed=1000))
    receiver = Channel(
        layout, 7, DtypeCodec(torch.bfloat16, 7), carries_ids=True, share=Share(0, count)
    )
    out = torch.empty_like(latent)
    got = receiver.unpack(payloads, out, PayloadGuard())
    assert torch.equal(out, latent)
    assert got is not None and torch.equal(got.long(), ids)
    total = traffic.report([ledger.sent])["total"]
    assert total["latents"] == latent.numel() * 2 and total["ids"] == ids.numel() * 2
    whole = ends()[0].layout_of((3, 4)).total_bytes
    assert total["unsplit"] == count * whole
    assert total["split_factor"] == count * whole / total["sent"]


@pytest.mark.parametrize("size", [0, 8, 20, 100])
@pytest.mark.parametrize("count", [1, 3])
def test_parcels_make_up_the_whole(size: int, count: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    ledger, shares = Ledger(), []
    for index in range(count):
        layout = PayloadLayout(2, Direction.PROJECTOR)
        one, other = (ParcelChannel(layout, "projector", Share(index, count)) for _ in range(2))
        payload = one.pack(data, ledger)
        assert payload.numel() == other.layout_of(size).total_bytes
        shares.append(other.unpack(payload, size, PayloadGuard()))
        assert torch.equal(shares[-1], one.own(data))
    assert torch.equal(torch.cat(shares)[:size], data)
    assert traffic.report([ledger.sent])["total"]["projector"] == sum(s.numel() for s in shares)


def test_ledgers_add_up_by_boundary_direction_and_kind() -> None:
    ledgers = [Ledger(), Ledger()]
    parts = (("scales", 16), ("latents", 64))
    forward = PayloadLayout(0, Direction.FORWARD, parts, id_count=4, vocab_size=2**16)
    exchange = PayloadLayout(1, Direction.PROJECTOR, (("projector", 128),))
    ledgers[0].count(forward, uncompressed=512, unsplit=1000)
    ledgers[1].count(forward, uncompressed=512, unsplit=1000)
    ledgers[1].count(exchange, uncompressed=0, unsplit=exchange.total_bytes)
    report = traffic.report(ledger.sent for ledger in ledgers)
    first, second = report["boundaries"]
    assert first["forward"]["latents"] == 128 and first["forward"]["ids"] == 16
    assert first["forward"]["scales"] == 32 and first["forward"]["unsplit"] == 2000
    assert first["forward"]["payloads"] == 2 and first["uncompressed"] == 1024
    assert second["projector"]["projector"] == 128 and second["projector"]["latents"] == 0
    assert second["split_factor"] == 1
    total = report["total"]
    assert total["sent"] == 2 * forward.total_bytes + exchange.total_bytes
    assert total["overhead"] == 1 - 128 / total["sent"]
