# SPDX-License-Identifier: Apache-2.0
"""Boundaries on a GPU: the same numbers as on the CPU, and no wait for the device."""

import pytest
import torch

from mapl.anchors import build_anchor
from mapl.boundary import decode, encode
from mapl.channel import Channel
from mapl.codecs import DtypeCodec
from mapl.payload import Direction, PayloadLayout
from mapl.payload_guard import PayloadError, PayloadGuard
from mapl.projectors import LearnedProjector
from mapl.stiefel import orthonormality_error
from mapl.traffic import Ledger

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOKENS, HIDDEN, RANK, ANCHOR, VOCABULARY = (129, 3), 517, 67, 33, 1000


def build(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, LearnedProjector]:
    generator = torch.Generator().manual_seed(1)
    anchor = build_anchor(
        "factorized",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        anchor_rank=ANCHOR,
        generator=generator,
    )
    with torch.no_grad():
        anchor.E.normal_(generator=generator)
    projector = LearnedProjector(HIDDEN, RANK, generator)
    return anchor.to(device, dtype), projector.to(device)


def train_once(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One micro-batch through one side and the other, and one step."""
    anchor, projector = build(device, dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*TOKENS, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, TOKENS, generator=generator).to(device)
    upstream = torch.randn(*TOKENS, HIDDEN, generator=generator).to(device, dtype)
    z = encode(x, anchor.coordinates(ids), anchor.basis, projector)
    decode(z, anchor.coordinates(ids), anchor.basis, projector).backward(upstream)
    gradient = projector.grad.clone()
    assert projector.step(0.01)
    results = {"z": z, "dx": x.grad, "dE": anchor.E.grad, "dA": gradient, "A": projector.A}
    return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_gpu_equals_cpu(dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu, on_gpu = train_once("cpu", torch.float32), train_once("cuda", dtype)
    for name, expected in on_cpu.items():
        error = (on_gpu[name] - expected).norm() / expected.norm()
        assert error < tolerance, (name, float(error))


def test_projector_stays_on_the_manifold() -> None:
    projector = LearnedProjector(1024, 128, torch.Generator().manual_seed(0)).cuda()
    for _ in range(200):
        projector.zero_grad()
        projector.accumulate(torch.randn(1024, 128, device="cuda"))
        projector.step(0.02)
        assert orthonormality_error(projector.A) < 1e-5


def test_payload_errors_are_read_once_a_step() -> None:
    layout = PayloadLayout(5, Direction.BACKWARD, vocab_size=2**16)
    ends = [Channel(layout, 8, DtypeCodec(torch.bfloat16, 8), carries_ids=True) for _ in range(2)]
    guard, ledger = PayloadGuard(), Ledger()
    latent = torch.randn(4, 2, 8, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 65536, (4, 2), device="cuda")
    out = torch.empty_like(latent)
    for number in range(3):
        payload = ends[0].pack(latent, ids, ledger, 0)
        if number == 1:
            payload[40] ^= 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ends[1].unpack([payload], out, guard)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if number != 1:
            assert torch.equal(out, latent) and torch.equal(got.long(), ids)
    with pytest.raises(PayloadError, match="boundary 5, backward, payload 1"):
        guard.raise_if_faulty()


def test_the_whole_way_does_not_wait_for_the_device() -> None:
    anchor, projector = build("cuda", torch.bfloat16)
    layout = PayloadLayout(0, Direction.FORWARD, vocab_size=VOCABULARY)
    ends = [
        Channel(layout, RANK, DtypeCodec(torch.bfloat16, RANK), carries_ids=True) for _ in range(2)
    ]
    x = torch.randn(*TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, TOKENS, device="cuda")
    guard, ledger = PayloadGuard(), Ledger()
    for end in ends:  # what is made once for each size
        empty = torch.empty(*TOKENS, RANK, device="cuda", dtype=torch.bfloat16)
        end.unpack(
            [end.pack(empty, ids, ledger, 0)],
            torch.empty_like(x[..., :RANK]),
            guard,
        )
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = encode(x, anchor.coordinates(ids), anchor.basis, projector)
        payload = ends[0].pack(z, ids, ledger, 0)
        latent = torch.empty_like(z, requires_grad=True)
        got = ends[1].unpack([payload], latent, guard)
        decode(latent, anchor.coordinates(got), anchor.basis, projector).sum().backward()
        z.backward(latent.grad)
        projector.step(0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    guard.raise_if_faulty()
