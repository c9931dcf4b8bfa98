# SPDX-License-Identifier: Apache-2.0
"""The exported modelling code computes what mapl's own boundaries do on a CPU.

Codecs bit for bit; whole boundaries to the last digits, for their GEMMs take tokens in other rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from mapl.anchors import build_anchor
from mapl.boundary import decode, encode
from mapl.codecs import CODECS, CodecEnd, CodecSettings, ResidualVQCodec, Role, build_codec
from mapl.ngrams import predecessors_of
from mapl.operands import Operands
from mapl.projectors import FixedProjector
from mapl_llama import modeling_mapl_llama as modeling
from mapl_llama.boundary_mapl_llama import MaplAnchor, MaplBoundary
from mapl_llama.configuration_mapl_llama import MaplLlamaConfig

D, RANK, K, VOCABULARY, BUCKETS = 48, 20, 12, 64, 128
FORWARD = [name for name in CODECS if name != "lowrank"]
SETTINGS = CodecSettings(group_size=16, topk=5, rvq_groups=4, rvq_codes=16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def end_of(role: Role, dtype: torch.dtype, width: int, *, sends: bool) -> CodecEnd:
    return CodecEnd(role=role, width=width, dtype=dtype, seed=1, settings=SETTINGS, sends=sends)


def config(anchor: str, codec: str, *, rank: int = RANK, projector: bool = True) -> MaplLlamaConfig:
    wide = {"none": 0, "static": D, "full": D}.get(anchor, K)
    boundary = {"layer": 1, "rank": rank, "codec": codec, "sender": 0, "receiver": 1}
    return MaplLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mapl_boundaries=[{**boundary, "rvq_groups": SETTINGS.rvq_groups}],
        mapl_stages=0 if anchor == "none" else 2,
        mapl_anchor=anchor,
        mapl_anchor_rank=wide,
        mapl_anchor_buckets=BUCKETS,
        mapl_projector=projector,
        mapl_codec={"group_size": 16, "topk": 5, "rvq_rounds": 4, "rvq_codes": 16},
    )


def over_the_wire(rows: Tensor, codec: str, codebook: Tensor | None) -> Tensor:
    """What arrives, by mapl's own codec."""
    sender, receiver = (
        build_codec(codec, end_of(Role.ACTIVATION, rows.dtype, rows.shape[1], sends=sends)).eval()
        for sends in (True, False)
    )
    if codebook is not None:
        for end in (sender, receiver):
            assert isinstance(end, ResidualVQCodec)
            end.stream = None  # entries that are streamed would change the codebook on the way
            end.codebook.copy_(codebook)
    body = sender.encode(rows, 0)
    out = torch.empty_like(rows)
    receiver.decode([body], out, 0)
    return out


def some_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Tokens of very different sizes, one of zeros among them."""
    torch.manual_seed(0)
    rows = torch.randn(40, width) * torch.logspace(-3, 3, 40)[:, None]
    rows[7] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", FORWARD)
def test_codecs(codec: str, dtype: torch.dtype) -> None:
    rows = some_rows(RANK, dtype)
    boundary = MaplBoundary(config("none", codec), 0).to(dtype)
    codebook = None
    if codec == "rvq":
        codebook = torch.randn(boundary.codec.codebook.shape).to(dtype).float()
        boundary.codec.codebook.copy_(codebook)
    expected = over_the_wire(rows, codec, codebook)
    assert torch.equal(boundary.codec(rows), expected)
    assert codec == "pipeline" or not torch.equal(expected, rows)


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_numbers_that_are_not_finite_spoil_their_group_alone(codec: str) -> None:
    rows = some_rows(RANK, torch.float32)
    rows[3, 2], rows[4, 18] = float("nan"), float("inf")
    arrived = MaplBoundary(config("none", codec), 0).codec(rows)
    assert torch.equal(arrived.isnan(), over_the_wire(rows, codec, None).isnan())
    assert arrived[3, :16].isnan().all() and arrived[3, 16:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [RANK, D])
@pytest.mark.parametrize("anchor", ["none", "static", "full", "factorized", "bigram"])
def test_boundary(anchor: str, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    projector = FixedProjector(D, rank, generator)
    stages = [
        build_anchor(
            anchor,
            vocab_size=VOCABULARY,
            hidden_size=D,
            anchor_rank=K,
            generator=generator,
            buckets=BUCKETS,
        )
        for _ in range(2)
    ]
    for stage in stages:
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        stage.to(dtype)
    ids = torch.randint(VOCABULARY, (2, 9), generator=generator)
    hidden = torch.randn(2, 9, D, generator=generator).to(dtype)
    ours = [stage(ids.T, predecessors_of(ids.T)) for stage in stages]
    with torch.no_grad():
        latent = encode(hidden.transpose(0, 1), ours[0], stages[0].basis, projector)
        arrived = over_the_wire(latent.flatten(0, 1), "int8", None).view(latent.shape)
        expected = decode(arrived, ours[1], stages[1].basis, projector).transpose(0, 1)

        settings = config(anchor, "int8", rank=rank)
        boundary, coordinates = MaplBoundary(settings, 0).to(dtype), {}
        for number, stage in enumerate(stages):
            if anchor != "none":
                exported = MaplAnchor(settings).to(dtype)
                tables = stage.state_dict()
                exported.tokens.copy_(tables["table" if anchor == "static" else "E"])
                if exported.bigrams is not None:
                    exported.bigrams.copy_(tables["B"])
                before = modeling.predecessors_of(ids, None, None)
                coordinates[number] = exported(ids, before)
        for name, stage in (("encode", stages[0]), ("decode", stages[1])):
            weight = Operands().get(name, projector.A, stage.basis, dtype)  # type: ignore[arg-type]
            getattr(boundary, f"{name}r").copy_(weight)
        found = boundary(hidden, coordinates)
    # A token's row stands elsewhere in the GEMM, whose last bit may differ for it.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * 8)
    assert not torch.equal(found, hidden)


def test_without_a_projector_activations_are_quantised() -> None:
    hidden = some_rows(D, torch.float32).view(2, 20, D)
    boundary = MaplBoundary(config("none", "int4", rank=D, projector=False), 0)
    expected = over_the_wire(hidden.flatten(0, 1), "int4", None).view(hidden.shape)
    assert torch.equal(boundary(hidden, {}), expected)
    assert not list(boundary.parameters())


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    hidden = torch.randn(2, 3, D, requires_grad=True)
    boundary = MaplBoundary(config("none", "int4"), 0)
    torch.nn.init.orthogonal_(boundary.encoder)
    boundary.decoder.copy_(boundary.encoder.T)
    boundary(hidden, {}).sum().backward()
    expected = torch.ones(2, 3, D) @ boundary.decoder.T @ boundary.encoder.T
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize(
    ("mask", "positions", "expected"),
    [
        (None, None, [[-1, 5, 6, 7]]),
        ([[0, 0, 1, 1]], None, [[-1, -1, -1, 7]]),
        ([[1, 1, 1, 0]], None, [[-1, 5, 6, 7]]),
        (None, [[0, 1, 0, 1]], [[-1, 5, -1, 7]]),
    ],
    ids=["whole", "left padding", "right padding", "packed"],
)
def test_predecessors(mask: Any, positions: Any, expected: list[list[int]]) -> None:
    given = [None if value is None else torch.tensor(value) for value in (mask, positions)]
    found = modeling.predecessors_of(torch.tensor([[5, 6, 7, 8]]), *given)
    visible = torch.ones_like(found) if given[0] is None else given[0]
    assert torch.equal(found * visible, torch.tensor(expected) * visible)
