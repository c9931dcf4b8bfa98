# SPDX-License-Identifier: Apache-2.0
"""Channels and the ledger: both ends agree, and bytes declared are bytes sent."""

import pytest
import torch

from mapl import traffic
from mapl.channel import Channel
from mapl.codecs import DtypeCodec
from mapl.payload import Direction, PayloadError, PayloadGuard, PayloadLayout
from mapl.traffic import Ledger


def ends(dtype: torch.dtype = torch.bfloat16, width: int = 7, *, ids: bool = True) -> list[Channel]:
    layout = PayloadLayout(0, Direction.FORWARD, 0, id_size=2)
    return [Channel(layout, width, DtypeCodec(dtype), carries_ids=ids) for _ in range(2)]


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
        got = receiver.unpack(payload, out, guard)
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
        receiver.unpack(second, torch.empty_like(latent), PayloadGuard())


def test_another_micro_batch_size_changes_the_size_on_both_ends() -> None:
    sender, receiver = ends()
    for tokens in ((4, 2), (4, 1), (4, 2)):
        latent = torch.randn(*tokens, 7).bfloat16()
        payload = sender.pack(latent, torch.zeros(tokens, dtype=torch.long), Ledger(), 0)
        receiver.unpack(payload, torch.empty_like(latent), PayloadGuard())


def test_a_codec_does_not_round_silently() -> None:
    sender, _ = ends(torch.bfloat16, ids=False)
    with pytest.raises(ValueError, match="float32"):
        sender.pack(torch.zeros(1, 1, 7), None, Ledger(), 0)


def test_ledgers_add_up_by_boundary_direction_and_kind() -> None:
    ledgers = [Ledger(), Ledger()]
    forward = PayloadLayout(0, Direction.FORWARD, 64, id_count=4, id_size=2)
    exchange = PayloadLayout(1, Direction.PROJECTOR, 128)
    ledgers[0].count(forward, uncompressed=512)
    ledgers[1].count(forward, uncompressed=512)
    ledgers[1].count(exchange, uncompressed=0)
    report = traffic.report(ledger.sent for ledger in ledgers)
    first, second = report["boundaries"]
    assert first["forward"]["latents"] == 128 and first["forward"]["ids"] == 16
    assert first["forward"]["payloads"] == 2 and first["uncompressed"] == 1024
    assert second["projector"]["projector"] == 128 and second["projector"]["latents"] == 0
    total = report["total"]
    assert total["sent"] == 2 * forward.total_bytes + exchange.total_bytes
    assert total["overhead"] == 1 - 128 / total["sent"]
