# SPDX-License-Identifier: Apache-2.0
"""Anchors: one suite over all of them, then what each promises alone."""

import copy

import pytest
import torch
from torch import nn

from mapl.anchors import (
    BigramAnchor,
    FactorizedAnchor,
    FullAnchor,
    NoAnchor,
    StaticAnchor,
    build_anchor,
)

V, D, RA = 50, 12, 5
KINDS = ["none", "factorized", "bigram", "static", "full"]
TABLES = ["factorized", "static", "full"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind, seed=0):
    return build_anchor(kind, vocab_size=V, hidden_size=D, anchor_rank=RA, generator=seeded(seed))


@pytest.mark.parametrize(
    "kind,cls",
    [
        ("none", NoAnchor),
        ("factorized", FactorizedAnchor),
        ("bigram", BigramAnchor),
        ("static", StaticAnchor),
        ("full", FullAnchor),
    ],
)
def test_names(kind, cls):
    anchor = build(kind)
    assert type(anchor) is cls and anchor.uses_ids == (kind != "none")


@pytest.mark.parametrize("kind", ["", "factorised", "None", "FULL"])
def test_unknown_names_are_refused(kind):
    with pytest.raises(ValueError, match="none, factorized, bigram, static, full"):
        build(kind)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (6,), (2, 3, 2), (0, 2)])
def test_ids_of_any_integer_type_and_shape(kind, dtype, shape):
    anchor = build(kind)
    table = anchor.table if kind == "static" else anchor.E
    nn.init.normal_(table)
    ids = torch.randint(V, shape, generator=seeded(1))
    coordinates = anchor(ids.to(dtype)).gathered()
    assert torch.equal(coordinates, table[ids])
    assert coordinates.shape == (*shape, RA if kind == "factorized" else D)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers_are_refused(kind, dtype):
    with pytest.raises(ValueError, match="integers"):
        build(kind)(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("kind", ["factorized", "full"])
def test_starts_at_zero_and_learns_repeated_ids(kind):
    anchor = build(kind)
    assert anchor.E.requires_grad and not anchor.E.any()
    ids = torch.tensor([[3, 3], [7, 3]], dtype=torch.uint16)
    upstream = torch.randn(2, 2, anchor.E.size(1), generator=seeded(1))
    anchor(ids).gathered().backward(upstream)
    expected = torch.zeros_like(anchor.E)
    expected[3] = upstream[0, 0] + upstream[0, 1] + upstream[1, 1]
    expected[7] = upstream[1, 0]
    torch.testing.assert_close(anchor.E.grad, expected)


def test_basis_has_orthonormal_rows_from_its_seed():
    basis = build("factorized", seed=2).basis
    assert basis.shape == (RA, D) and basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.mT, torch.eye(RA), rtol=0, atol=1e-6)
    assert torch.equal(basis, build("factorized", seed=2).basis)
    assert not torch.equal(basis, build("factorized", seed=3).basis)


@pytest.mark.parametrize("kind", ["none", "static", "full"])
def test_the_others_have_the_identity_basis(kind):
    assert build(kind).basis is None


def test_no_anchor():
    anchor = build("none")
    assert anchor(torch.zeros(2, 2, dtype=torch.int32)) is None
    assert not list(anchor.parameters()) and not anchor.state_dict()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
    ],
)
def test_a_cast_of_the_model_casts_tables_and_leaves_the_basis(cast):
    factorized, static, full = (build(kind) for kind in TABLES)
    basis = factorized.basis.clone()
    model = cast(nn.ModuleList([factorized, static, full]))
    narrow = {factorized.E.dtype, static.table.dtype, full.E.dtype}
    assert len(narrow) == 1 and narrow <= {torch.bfloat16, torch.float16}
    assert factorized.basis.dtype == torch.float32 and torch.equal(factorized.basis, basis)
    assert isinstance(factorized.E, nn.Parameter) and factorized.E.requires_grad
    assert "0.basis" in model.state_dict()


def test_the_basis_follows_the_device():
    anchor = build("factorized").to("meta")
    assert anchor.basis.is_meta and anchor.E.is_meta
    assert anchor.to_empty(device="cpu").basis.device.type == "cpu"


def test_static_table_is_frozen_scaled_and_shared_by_seed():
    table = StaticAnchor(2000, 64, seeded(4), std=0.05).table
    assert torch.equal(table, StaticAnchor(2000, 64, seeded(4), std=0.05).table)
    assert table.std().item() == pytest.approx(0.05, rel=0.02)
    assert build("static").table.std().item() == pytest.approx(0.02, rel=0.2)
    assert not build("static")(torch.zeros(1, 1, dtype=torch.int64)).gathered().requires_grad
    assert not list(build("static").parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_building_leaves_the_global_generator_alone(kind):
    state = torch.get_rng_state()
    build(kind)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_carries_everything(kind):
    source, target = build(kind, seed=1), build(kind, seed=2)
    if kind in ("factorized", "full"):
        nn.init.normal_(source.E)
    target.load_state_dict(source.state_dict())
    for anchor in (target, copy.deepcopy(source)):
        for name, value in source.state_dict().items():
            assert torch.equal(anchor.state_dict()[name], value)


@pytest.mark.parametrize("rank", [0, D + 1])
def test_refuses_anchor_ranks(rank):
    with pytest.raises(ValueError, match=f"got {rank}"):
        FactorizedAnchor(V, D, rank, seeded())


@pytest.mark.parametrize("kind", TABLES)
def test_refuses_an_empty_vocabulary(kind):
    with pytest.raises(ValueError, match="vocabulary"):
        build_anchor(kind, vocab_size=0, hidden_size=D, anchor_rank=RA, generator=seeded())
