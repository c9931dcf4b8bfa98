# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes arrive, they give the payload that is due or one clear error: nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapl.channel import Channel, Share
from mapl.codecs import CODECS, CodecEnd, CodecSettings, Role, build_codec
from mapl.payload import Direction, PayloadLayout, pack
from mapl.payload_guard import PayloadError, PayloadGuard
from mapl.traffic import Ledger

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
WIDTH = 24

#: Codecs and what they can carry.
USES = [
    (name, role)
    for name in sorted(CODECS)
    for role in Role
    if name != "lowrank" or role is Role.GRADIENT
]
#: name and role, dtype, vocabulary, whether ids go along, how many processes send
Choice = tuple[tuple[str, Role], torch.dtype, int, bool, int]
channels = st.tuples(
    st.sampled_from(USES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([3, 256, 1000, 70000, 2**24 + 5]),
    st.booleans(),
    st.sampled_from([1, 2]),
)


def build(choice: Choice, *, sends: bool) -> Channel:
    (name, role), dtype, vocabulary, ids, shards = choice
    end = CodecEnd(
        role=role,
        width=WIDTH,
        dtype=dtype,
        seed=1,
        settings=CodecSettings(group_size=7, topk=5, lowrank_q=3, rvq_groups=3, rvq_codes=16),
        shards=shards,
        sends=sends,
    )
    codec = build_codec(name, end)
    direction = Direction.FORWARD if role is Role.ACTIVATION else Direction.BACKWARD
    layout = PayloadLayout(2, direction, vocab_size=vocabulary)
    return Channel(layout, WIDTH, codec, carries_ids=ids, share=Share(0, shards))


@EXAMPLES
@given(channels, st.binary(max_size=600), st.booleans())
def test_any_bytes_at_all(choice: Choice, data: bytes, fit: bool) -> None:
    """Random bytes, of any length or of the one that is due, never pass for a payload."""
    channel = build(choice, sends=False)
    if fit:
        total = channel.layout_of((4, 2)).total_bytes
        data = (data * (total // max(1, len(data)) + 1))[:total].ljust(total, b"\0")
    payload = torch.tensor(list(data), dtype=torch.uint8)
    try:
        channel.unpack([payload] * channel.share.count, _empty(choice, (4, 2)), PayloadGuard())
    except PayloadError as error:
        assert "boundary 2" in str(error) and "payload 0" in str(error)
    else:
        raise AssertionError("random bytes passed for a payload")


@EXAMPLES
@given(channels, st.data())
def test_a_damaged_payload(choice: Choice, data: st.DataObject) -> None:
    """Bits flipped, bytes overwritten, pieces cut out, moved or doubled: all of it is seen."""
    sender, receiver = build(choice, sends=True), build(choice, sends=False)
    tokens = (4, 2)
    whole = torch.randn(*tokens, WIDTH).to(choice[1])
    ids = torch.randint(0, choice[2], tokens)
    payload = sender.pack(whole, ids, Ledger(), 0)
    content = bytes(payload.tolist())
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin + 1, len(content)))
    how = data.draw(st.sampled_from(["flip", "overwrite", "cut", "double", "swap"]))
    if how == "flip":
        bit = data.draw(st.integers(0, 7))
        damaged = content[:begin] + bytes([content[begin] ^ 1 << bit]) + content[begin + 1 :]
    elif how == "overwrite":
        damaged = content[:begin] + data.draw(st.binary(min_size=end - begin, max_size=end - begin))
        damaged += content[end:]
    elif how == "cut":
        damaged = content[:begin] + content[end:]
    elif how == "double":
        damaged = content[:end] + content[begin:]
    else:
        damaged = content[end:] + content[begin:end] + content[:begin]
    if damaged == content:
        return
    pieces = [torch.tensor(list(damaged), dtype=torch.uint8)] * choice[4]
    try:
        receiver.unpack(pieces, _empty(choice, tokens), PayloadGuard())
    except PayloadError as error:
        assert "boundary 2" in str(error)
    else:
        raise AssertionError(f"{how} from {begin} to {end} was not seen")


@EXAMPLES
@given(channels, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_any_body_in_a_whole_frame(choice: Choice, seed: int, number: int) -> None:
    """A peer that frames nonsense: it decodes to numbers, or its ids are refused."""
    channel = build(choice, sends=False)
    channel.received = number
    tokens, generator = (4, 2), torch.Generator().manual_seed(seed)
    layout = channel.layout_of(tokens)

    def noise(size: int) -> torch.Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)

    wild = torch.randint(0, 2**24, (layout.id_count,), generator=generator)
    ids = wild if channel.carries_ids else None
    payloads = [pack(layout, number, noise(layout.body_bytes), ids) for _ in range(choice[4])]
    out = _empty(choice, tokens)
    try:
        got = channel.unpack(payloads, out, PayloadGuard())
    except PayloadError as error:
        assert f"the vocabulary of {choice[2]}" in str(error)
        return
    if got is not None:
        assert got.shape == tokens and 0 <= int(got.min()) and int(got.max()) < choice[2]
    assert not torch.equal(out, torch.full_like(out, 7.5))


def _empty(choice: Choice, tokens: tuple[int, int]) -> torch.Tensor:
    return torch.full((*tokens, WIDTH), 7.5, dtype=choice[1])
