# SPDX-License-Identifier: Apache-2.0
"""Frames: what is packed comes back, and nothing else gets through."""

import pytest
import torch

from mapl.payload import Direction, PayloadLayout, pack
from mapl.payload_guard import PayloadError, PayloadGuard
from mapl.token_ids import id_size


def layout(body: int = 37, ids: int = 5, size: int = 2) -> PayloadLayout:
    parts = (("scales", body // 3), ("latents", body - body // 3))
    vocabulary = min(2 ** (8 * size), 2**31)
    return PayloadLayout(3, Direction.FORWARD, parts, id_count=ids, vocab_size=vocabulary)


def random_payload(frame: PayloadLayout, sequence: int = 11) -> tuple[torch.Tensor, ...]:
    body = torch.randint(0, 256, (frame.body_bytes,), dtype=torch.uint8)
    ids = torch.randint(0, frame.vocab_size, (frame.id_count,))
    return pack(frame, sequence, body, ids if frame.id_count else None), body, ids


@pytest.mark.parametrize("body", [0, 1, 8, 37, 4096])
@pytest.mark.parametrize("ids", [0, 1, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_round_trip_and_declared_size(body: int, ids: int, size: int) -> None:
    frame = layout(body, ids, size)
    payload, sent_body, sent_ids = random_payload(frame)
    assert payload.numel() == frame.total_bytes
    assert frame.frame_bytes + frame.id_bytes + frame.body_bytes == frame.total_bytes
    got_ids, got_body = PayloadGuard().unpack(frame, 11, payload)
    assert torch.equal(got_body, sent_body)
    if ids:
        assert got_ids is not None and torch.equal(got_ids.long(), sent_ids)
    else:
        assert got_ids is None


def test_every_flipped_byte_is_seen() -> None:
    frame = layout()
    payload, _, _ = random_payload(frame)
    for position in range(payload.numel()):
        for bit in (0, 7):
            damaged = payload.clone()
            damaged[position] ^= 1 << bit
            with pytest.raises(PayloadError, match="boundary 3, forward, payload 11"):
                PayloadGuard().unpack(frame, 11, damaged)


def test_swapped_words_are_seen() -> None:
    frame = layout(body=80, ids=0)
    payload, _, _ = random_payload(frame)
    words = payload.view(torch.int64)
    words[4], words[5] = words[5].clone(), words[4].clone()
    with pytest.raises(PayloadError, match="checksum"):
        PayloadGuard().unpack(frame, 11, payload)


@pytest.mark.parametrize("missing", [1, 8, 32])
def test_truncated_payload(missing: int) -> None:
    frame = layout()
    payload, _, _ = random_payload(frame)
    with pytest.raises(PayloadError, match=rf"{frame.total_bytes - missing} bytes arrived"):
        PayloadGuard().unpack(frame, 11, payload[:-missing])


def test_another_payload_than_is_due() -> None:
    frame = layout()
    payload, _, _ = random_payload(frame)
    guard = PayloadGuard()
    with pytest.raises(PayloadError, match="payload 11 arrived: the stages are out of step"):
        guard.unpack(frame, 12, payload)
    other = PayloadLayout(4, Direction.BACKWARD, (("latents", 37),), id_count=5, vocab_size=2**16)
    with pytest.raises(PayloadError, match="boundary 3, direction 0, arrived"):
        guard.unpack(other, 11, payload)


def test_flags_are_raised_once_a_step_and_name_the_first_bad_payload() -> None:
    """The path of devices that must not wait for the host, run here on CPU tensors."""
    frame = layout()
    guard = PayloadGuard()
    for sequence in range(4):
        payload, _, _ = random_payload(frame, sequence)
        if sequence in (1, 3):
            payload[40] ^= 1
        guard.flag(frame, sequence, payload.view(torch.int64))
    with pytest.raises(PayloadError, match="boundary 3, forward, payload 1:"):
        guard.raise_if_faulty()
    guard.raise_if_faulty()  # the flags were read
    payload, _, _ = random_payload(frame, 4)
    guard.flag(frame, 4, payload.view(torch.int64))
    guard.raise_if_faulty()  # a good payload raises nothing


def test_pack_refuses_what_does_not_fit() -> None:
    frame = layout()
    ids = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="36"):
        pack(frame, 0, torch.zeros(36, dtype=torch.uint8), ids)
    with pytest.raises(ValueError, match="4 token ids"):
        pack(frame, 0, torch.zeros(37, dtype=torch.uint8), ids[:4])
    with pytest.raises(ValueError, match="0 token ids"):
        pack(frame, 0, torch.zeros(37, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("vocabulary", "size"),
    [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24, 3), (2**24 + 1, 4), (2**31, 4)],
)
def test_ids_take_the_fewest_bytes(vocabulary: int, size: int) -> None:
    assert id_size(vocabulary) == size
    frame = PayloadLayout(3, Direction.FORWARD, id_count=2, vocab_size=vocabulary)
    assert frame.id_size == size
    ids = torch.tensor([vocabulary - 1, 0])
    payload = pack(frame, 0, torch.empty(0, dtype=torch.uint8), ids)
    got, _ = PayloadGuard().unpack(frame, 0, payload)
    assert got is not None and got.tolist() == ids.tolist()


def test_vocabulary_larger_than_the_id_type() -> None:
    with pytest.raises(ValueError, match=f"{2**31 + 1} tokens exceeds"):
        id_size(2**31 + 1)


@pytest.mark.parametrize("vocabulary", [3, 255, 65535, 2**24 + 1])
def test_an_id_beyond_the_vocabulary_is_seen(vocabulary: int) -> None:
    """The frame is whole, but the sender has another vocabulary: a look-up would read beyond."""
    frame = PayloadLayout(3, Direction.FORWARD, id_count=2, vocab_size=vocabulary)
    ids = torch.tensor([vocabulary - 1, vocabulary])
    payload = pack(frame, 0, torch.empty(0, dtype=torch.uint8), ids)
    with pytest.raises(PayloadError, match=f"not in the vocabulary of {vocabulary}: both sides"):
        PayloadGuard().unpack(frame, 0, payload)
    guard = PayloadGuard()  # the path of devices that must not wait for the host
    guard.flag(frame, 0, payload.view(torch.int64), ids)
    with pytest.raises(PayloadError, match="boundary 3, forward, payload 0:"):
        guard.raise_if_faulty()
