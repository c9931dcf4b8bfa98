# SPDX-License-Identifier: Apache-2.0
"""docs/wire-format.md: a reader and a writer made from the page alone agree with the code."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import independent_reader as page
from mapl.channel import WHOLE, Channel, Share
from mapl.codecs import CodecEnd, CodecSettings, Role, build_codec
from mapl.parcel import ParcelChannel
from mapl.payload import Direction, PayloadLayout
from mapl.payload_guard import PayloadGuard
from mapl.stiefel import random_stiefel
from mapl.traffic import Ledger
from megatron.mapl.port import private_seed

VOCABULARY = 70000  # ids of three bytes
SEQUENCE, BATCH, WIDTH = 5, 3, 20
ROWS = SEQUENCE * BATCH
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = CodecSettings(
    group_size=8, topk=3, lowrank_q=2, rvq_groups=4, rvq_rounds=3, rvq_codes=8, rvq_sync_entries=3
)


def channel(
    codec: str,
    role: Role,
    dtype: torch.dtype,
    *,
    sends: bool = True,
    boundary: int = 3,
    share: Share = WHOLE,
    settings: CodecSettings = SETTINGS,
) -> Channel:
    direction = Direction.FORWARD if role is Role.ACTIVATION else Direction.BACKWARD
    end = CodecEnd(
        role=role,
        width=WIDTH,
        dtype=dtype,
        seed=private_seed(1234, f"codec {direction.name}", boundary),
        settings=settings,
        shards=share.count,
        shard=share.index,
        sender=2,
        sends=sends,
    )
    layout = PayloadLayout(boundary, direction, vocab_size=VOCABULARY)
    ids = direction is Direction.FORWARD
    return Channel(layout, WIDTH, build_codec(codec, end), carries_ids=ids, share=share)


def activations(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator) * 3
    rows[1, 0] = 0
    ids = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=generator, dtype=torch.int32)
    return rows.to(dtype), ids


def read(sender: Channel, payload: torch.Tensor, rows: int = ROWS) -> page.Payload:
    size = sender.codec.body_bytes(rows)
    count = rows if sender.carries_ids else 0
    return page.read(payload.numpy().tobytes(), count, VOCABULARY, size)


def decoded(name: str, role: Role, body: bytes, dtype: str) -> np.ndarray:
    if name == "pipeline":
        return page.numbers(body, dtype).reshape(ROWS, WIDTH)
    if name == "topk":
        return page.topk(body, ROWS, WIDTH, 3, dtype)
    if name == "lowrank":
        return page.lowrank(body, ROWS, WIDTH, 2, dtype)
    kind = {Role.ACTIVATION: "e4m3", Role.GRADIENT: "e5m2"}[role] if name == "fp8" else name
    return page.scaled(body, ROWS, WIDTH, kind, 8)


CASES = [
    (name, role)
    for name in ("pipeline", "fp8", "int8", "int4", "topk", "lowrank")
    for role in Role
    if name != "lowrank" or role is Role.GRADIENT
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "role"), CASES)
def test_a_reader_made_from_the_page(name: str, role: Role, dtype: str) -> None:
    sender = channel(name, role, DTYPES[dtype])
    receiver = channel(name, role, DTYPES[dtype], sends=False)
    for number in range(2):
        rows, ids = activations(DTYPES[dtype], number)
        payload = sender.pack(rows, ids, Ledger(), 0)
        found = read(sender, payload)
        direction = 0 if role is Role.ACTIVATION else 1
        assert (found.boundary, found.direction, found.sequence) == (3, direction, number)
        assert found.ids == (ids.flatten().tolist() if direction == 0 else [])
        out = torch.empty_like(rows)
        receiver.unpack([payload], out, PayloadGuard())
        ours = torch.from_numpy(decoded(name, role, found.body, dtype)).to(DTYPES[dtype])
        if name == "lowrank":  # a product, which may be summed in another order
            torch.testing.assert_close(ours, out.view(ROWS, WIDTH), rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(ours, out.view(ROWS, WIDTH))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", ["pipeline", "fp8", "int8", "int4", "topk"])
def test_a_writer_made_from_the_page_sends_the_same_bytes(name: str, role: Role) -> None:
    sender = channel(name, role, torch.float32)
    seed = page.seed(1234, "codec FORWARD" if role is Role.ACTIVATION else "codec BACKWARD", 3)
    for number in range(2):
        rows, ids = activations(torch.float32, number)
        array = rows.view(ROWS, WIDTH).numpy()
        if name == "pipeline":
            body = array.astype("<f4").tobytes()
        elif name == "topk":
            body = page.encode_topk(array, 3)
        elif name == "fp8":
            kind = {Role.ACTIVATION: "e4m3", Role.GRADIENT: "e5m2"}[role]
            body = page.encode_eight_bit_floats(array, kind, 8)
        else:
            chances = None
            if role is Role.GRADIENT:
                chances = page.chances(seed, 2, number, array.size).reshape(array.shape)
            body = page.encode_integers(array, name, 8, chances)
        carried = ids.flatten().tolist() if role is Role.ACTIVATION else []
        direction = 0 if role is Role.ACTIVATION else 1
        written = page.write(page.Payload(3, direction, number, carried, body), VOCABULARY)
        assert written == sender.pack(rows, ids, Ledger(), 0).numpy().tobytes()


def received(receiver: Channel, body: bytes, number: int, ids: list[int]) -> np.ndarray:
    """What our receiver makes of a payload that was written by the page."""
    written = page.write(page.Payload(3, 0 if ids else 1, number, ids, body), VOCABULARY)
    out = torch.empty(SEQUENCE, BATCH, WIDTH)
    receiver.unpack([torch.frombuffer(bytearray(written), dtype=torch.uint8)], out, PayloadGuard())
    return out.view(ROWS, WIDTH).numpy()


def test_a_writer_of_low_rank_may_factorise_as_it_likes() -> None:
    receiver = channel("lowrank", Role.GRADIENT, torch.float32, sends=False)
    drawn = np.random.default_rng(0)
    for number in range(2):
        p, q = np.linalg.qr(drawn.normal(size=(ROWS, 2)))[0], drawn.normal(size=(WIDTH, 2))
        out = received(receiver, page.encode_lowrank(p, q), number, [])
        np.testing.assert_allclose(out, p @ q.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["round-robin", "random"])
def test_a_writer_of_codebooks_may_learn_as_it_likes(order: str) -> None:
    settings = replace(SETTINGS, rvq_order=order)
    receiver = channel("rvq", Role.ACTIVATION, torch.float32, sends=False, settings=settings)
    seed = page.seed(1234, "codec FORWARD", 3)
    writer, reader = (
        page.Codebooks(4, 3, 8, 3, 1, order == "random", seed, WIDTH, "fp32") for _ in range(2)
    )
    drawn = np.random.default_rng(0)
    for number in range(4):
        rows = activations(torch.float32, number)[0].view(ROWS, WIDTH).numpy()
        body = writer.encode(rows, number, drawn.normal(size=(4, 3, 3, 5)).astype(np.float32) / 2)
        out = received(receiver, body, number, list(range(ROWS)))
        assert np.array_equal(out, reader.decode([body], ROWS, number))
        assert np.array_equal(receiver.codec.codebook.numpy(), writer.table)
        assert ((out - rows) ** 2).sum() < 0.8 * (rows**2).sum()
        receiver.codec.update(None)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "int8", "int4"])
def test_every_code_is_read_alike(kind: str) -> None:
    """A writer's own payload with all codes there are, those that no sender of ours makes too."""
    role = Role.GRADIENT if kind == "e5m2" else Role.ACTIVATION
    name = "fp8" if kind.startswith("e") else kind
    receiver = channel(name, role, torch.float32, sends=False)
    groups = ROWS * 3
    scales = np.resize(np.array([0x3F80, 0x4020, 0x7FC0, 0x0080], "<u2"), groups).tobytes()
    size = ROWS * WIDTH // (2 if kind == "int4" else 1)
    body = scales + np.resize(np.arange(256, dtype=np.uint8), size).tobytes()
    ids = [] if role is Role.GRADIENT else list(range(ROWS))
    written = page.write(page.Payload(3, int(role is Role.GRADIENT), 0, ids, body), VOCABULARY)
    out = torch.empty(SEQUENCE, BATCH, WIDTH)
    payload = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    got = receiver.unpack([payload], out, PayloadGuard())
    assert (got is None) if not ids else got.flatten().tolist() == ids
    ours = torch.from_numpy(page.scaled(body, ROWS, WIDTH, kind, 8))
    ours = ours.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    assert torch.equal(ours.nan_to_num(nan=7.5), out.view(ROWS, WIDTH).nan_to_num(nan=7.5))
    assert ours.isnan().any()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("order", ["round-robin", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks_are_followed(dtype: str, order: str, ranks: int) -> None:
    """From the seed to entries that have moved, over more than one cycle of the codes."""
    settings = replace(SETTINGS, rvq_order=order)
    senders = [
        channel("rvq", Role.ACTIVATION, DTYPES[dtype], share=Share(t, ranks), settings=settings)
        for t in range(ranks)
    ]
    receiver = channel(
        "rvq", Role.ACTIVATION, DTYPES[dtype], sends=False, share=Share(0, ranks), settings=settings
    )
    seed = page.seed(1234, "codec FORWARD", 3)
    ours = page.Codebooks(4, 3, 8, 3, ranks, order == "random", seed, WIDTH, dtype)
    assert np.array_equal(ours.table, receiver.codec.codebook.numpy())
    for number in range(4):
        rows, ids = activations(DTYPES[dtype], number)
        rows, ids = rows[:4], ids[:4]  # which two ranks can share
        payloads = [sender.pack(rows, ids, Ledger(), 0) for sender in senders]
        n = rows.shape[0] * BATCH // ranks
        found = [read(sender, p, n) for sender, p in zip(senders, payloads, strict=True)]
        assert [one for part in found for one in part.ids] == ids.flatten().tolist()
        out = torch.empty_like(rows)
        receiver.unpack(payloads, out, PayloadGuard())
        got = torch.from_numpy(ours.decode([one.body for one in found], n * ranks, number))
        assert torch.equal(got.to(DTYPES[dtype]), out.view(-1, WIDTH))
        assert np.array_equal(ours.table, receiver.codec.codebook.numpy())
        total = sum(sender.codec.statistics() for sender in senders)
        for sender in senders:
            sender.codec.update(total.clone())
        receiver.codec.update(None)


@pytest.mark.parametrize("direction", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shares_of_what_crosses_once_a_step(direction: int, dtype: str) -> None:
    matrix = random_stiefel(7, 3, torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    data = matrix.view(torch.uint8).flatten()
    pieces = b""
    for index in range(4):
        layout = PayloadLayout(5, Direction(direction))
        parcels = ParcelChannel(layout, "projector", Share(index, 4))
        for number in range(2):
            payload = parcels.pack(data, Ledger()).numpy().tobytes()
            part = page.share(data.numpy().tobytes(), index, 4)
            assert payload == page.write(page.Payload(5, direction, number, [], part), 1)
        pieces += page.read(payload, 0, 1, len(part)).body
    got = page.numbers(pieces[: len(data)], dtype).reshape(7, 3)
    assert np.array_equal(got, matrix.float().numpy())


def test_the_page_is_what_the_reader_was_made_from() -> None:
    """Nothing of this project helps it."""
    imported = set()
    for node in ast.walk(ast.parse(Path(page.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.partition(".")[0])
    assert imported <= {"hashlib", "math", "struct", "dataclasses", "numpy"}
