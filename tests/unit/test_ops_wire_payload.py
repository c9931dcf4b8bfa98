# SPDX-License-Identifier: Apache-2.0
"""The kernels of the frame: the reference's bytes, nothing else gets through, and few launches."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mapl.channel import Channel, Share
from mapl.codecs import CodecEnd, CodecSettings, Role, build_codec
from mapl.payload import Direction, PayloadLayout, pack
from mapl.payload_guard import PayloadError, PayloadGuard
from mapl.traffic import Ledger

pytest.importorskip("triton")

SCALED = ["fp8", "int8", "int4"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written to is not zero."""
    empty = torch.empty

    def full(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        return fresh.fill_(-1 if fresh.dtype.is_signed else 0xA5)

    monkeypatch.setattr(torch, "empty", full)


def layout(body: int = 37, ids: int = 5, size: int = 2) -> PayloadLayout:
    vocabulary = min(2 ** (8 * size), 2**31) - 1
    return PayloadLayout(
        3, Direction.BACKWARD, (("latents", body),), id_count=ids, vocab_size=vocabulary
    )


def reference(monkeypatch, *args) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setenv("MAPL_OPS", "reference")
        return pack(*args)


def content(frame: PayloadLayout) -> tuple[torch.Tensor, torch.Tensor]:
    body = torch.randint(0, 256, (frame.body_bytes,), dtype=torch.uint8)
    return body, torch.randint(0, frame.vocab_size, (frame.id_count,))


def faulty(frame: PayloadLayout, sequence: int, payload: torch.Tensor) -> bool:
    guard = PayloadGuard()
    guard.unpack(frame, sequence, payload)
    try:
        guard.raise_if_faulty()
    except PayloadError as error:
        assert f"boundary {frame.boundary}, backward, payload {sequence}:" in str(error)
        return True
    return False


@pytest.mark.parametrize("body", [0, 8, 37, 20001])
@pytest.mark.parametrize(("ids", "dtype"), [(0, None), (5, torch.int32), (2500, torch.int64)])
@pytest.mark.parametrize(("size", "sequence"), [(1, 0), (2, 1), (3, 16), (4, 2**33 + 5)])
def test_bytes_and_round_trip(monkeypatch, device, body, ids, dtype, size, sequence):
    frame = layout(body, ids, size)
    sent_body, sent_ids = content(frame)
    expected = reference(monkeypatch, frame, sequence, sent_body, sent_ids if ids else None)
    given = sent_ids.to(device, dtype) if ids else None
    payload = pack(frame, sequence, sent_body.to(device), given)
    assert torch.equal(payload.cpu(), expected)
    guard = PayloadGuard()
    got_ids, got_body = guard.unpack(frame, sequence, payload)
    guard.raise_if_faulty()
    assert torch.equal(got_body.cpu(), sent_body)
    if ids:
        assert got_ids is not None and got_ids.dtype == torch.int32
        assert torch.equal(got_ids.cpu().long(), sent_ids)
    else:
        assert got_ids is None


def test_flipped_bits_are_seen_in_every_word(device):
    frame = layout()
    body, ids = content(frame)
    payload = pack(frame, 11, body.to(device), ids.to(device))
    assert not faulty(frame, 11, payload)
    for position in range(0, payload.numel(), 3):
        damaged = payload.clone()
        damaged[position] ^= 1 << position % 8
        assert faulty(frame, 11, damaged), position


@pytest.mark.parametrize("distance", [1, 2, 1500])
def test_swapped_words_are_seen(device, distance):
    frame = layout(body=20000, ids=0)
    payload = pack(frame, 11, content(frame)[0].to(device))
    words = payload.view(torch.int64)
    words[4], words[4 + distance] = words[4 + distance].clone(), words[4].clone()
    assert faulty(frame, 11, payload)


def test_another_payload_than_is_due(device):
    frame = layout()
    body, ids = content(frame)
    payload = pack(frame, 11, body.to(device), ids.to(device))
    assert faulty(frame, 12, payload)
    assert faulty(replace(frame, boundary=4), 11, payload)
    other = replace(frame, direction=Direction.PROJECTOR)
    guard = PayloadGuard()
    guard.unpack(other, 11, payload)
    with pytest.raises(PayloadError, match="boundary 3, projector, payload 11:"):
        guard.raise_if_faulty()
    with pytest.raises(PayloadError, match="bytes arrived"):
        guard.unpack(frame, 11, payload[:-8])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("place", [0, 1999])
def test_an_id_beyond_the_vocabulary_is_seen_and_harmless(device, size, place):
    frame = layout(body=8, ids=2000, size=size)
    body, ids = content(frame)
    ids[place] = frame.vocab_size  # or, of four bytes, a negative one
    if size == 4:
        ids[place] += 1
    payload = pack(frame, 3, body.to(device), ids.to(device))
    guard = PayloadGuard()
    got, _ = guard.unpack(frame, 3, payload)
    assert got is not None
    assert 0 <= int(got.min()) and int(got.max()) < frame.vocab_size
    with pytest.raises(PayloadError, match="boundary 3, backward, payload 3:"):
        guard.raise_if_faulty()


def test_the_first_bad_payload_is_named_once(device):
    frame = layout()
    guard = PayloadGuard()
    for sequence in range(6):
        body, ids = content(frame)
        payload = pack(frame, sequence, body.to(device), ids.to(device))
        if sequence in (2, 4):
            payload[40] ^= 1
        guard.unpack(frame, sequence, payload)
    with pytest.raises(PayloadError, match="boundary 3, backward, payload 2:"):
        guard.raise_if_faulty()
    guard.raise_if_faulty()


# --- the whole way --------------------------------------------------------------------------------


def channel(name: str, role: Role, *, sends: bool, share: Share) -> Channel:
    settings = CodecSettings(group_size=16, rvq_codes=16, rvq_sync="frozen")
    end = CodecEnd(
        role=role,
        width=48,
        dtype=torch.float32,
        seed=3,
        settings=settings,
        shards=share.count,
        shard=share.index,
        sends=sends,
    )
    frame = PayloadLayout(1, Direction.FORWARD, vocab_size=70000)
    return Channel(frame, 48, build_codec(name, end), carries_ids=True, share=share)


@pytest.mark.parametrize("name", ["pipeline", *SCALED])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("count", [1, 3])
def test_payloads_of_a_channel_are_those_of_the_reference(monkeypatch, device, name, role, count):
    latent, ids = torch.randn(3, 2, 48), torch.randint(0, 70000, (3, 2))
    latent[0, 1, 7] = float("nan")
    results = {}
    for ops, place in (("triton", device), ("reference", torch.device("cpu"))):
        monkeypatch.setenv("MAPL_OPS", ops)
        shares = [Share(index, count) for index in range(count)]
        senders = [channel(name, role, sends=True, share=share) for share in shares]
        receiver = channel(name, role, sends=False, share=shares[0])
        guard = PayloadGuard()
        for _ in range(2):
            args = latent.to(place), ids.to(place), Ledger(), 0
            payloads = [sender.pack(*args) for sender in senders]
            out = torch.empty(3, 2, 48, device=place)
            got = receiver.unpack(payloads, out, guard)
        guard.raise_if_faulty()
        assert got is not None and torch.equal(got.cpu().long(), ids)
        results[ops] = [*(payload.cpu() for payload in payloads), out.cpu()]
    for left, right in zip(*results.values(), strict=True):
        assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


class Launches(TorchDispatchMode):
    """Notes what runs on a GPU: kernels, and torch's operations that are no views."""

    #: Bare allocations, and what `poisoned` adds to them.
    FREE = ("aten::empty", "aten::new_empty", "aten::fill_")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from mapl.ops import launch
        from mapl.ops.kernels import payload

        patch.setattr(launch, "_compiled", {})  # each kernel's first launch goes by Triton
        self.names: list[str] = []
        kind = type(payload._seal_payload)
        run = kind.run

        def noted(kernel, *args, **kwargs):
            self.names.append(kernel.fn.__name__)
            with _disable_current_modes():  # the interpreter copies the operands
                return run(kernel, *args, **kwargs)

        patch.setattr(kind, "run", noted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
        if not view and schema.name not in self.FREE:
            self.names.append(schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("role", Role)
def test_two_launches_each_way(monkeypatch, device, name, role):
    sender, receiver = (channel(name, role, sends=s, share=Share(0, 1)) for s in (True, False))
    latent = torch.randn(3, 2, 48, device=device)
    ids = torch.randint(0, 70000, (3, 2), device=device)
    out, guard = torch.zeros_like(latent), PayloadGuard()
    # The first payload of a step makes the guard's mark.
    receiver.unpack([sender.pack(latent, ids, Ledger(), 0)], out, guard)
    with monkeypatch.context() as patch:
        with Launches(patch) as sending:
            payload = sender.pack(latent, ids, Ledger(), 0)
    assert sending.names == ["_encode_groups", "_seal_payload"]
    with monkeypatch.context() as patch:
        with Launches(patch) as receiving:
            receiver.unpack([payload], out, guard)
    assert receiving.names == ["_check_payload", "_decode_groups"]
