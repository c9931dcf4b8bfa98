# SPDX-License-Identifier: Apache-2.0
"""The formula of what boundaries add to a process's memory, held against real boundaries."""

from dataclasses import replace

import pytest
import torch

from mapl.anchors import build_anchor
from mapl.boundary import decode, encode
from mapl.memory import Stage, added, in_flight
from mapl.ngrams import bigram_buckets, predecessors_of
from mapl.ops.scatter import TokenOrder
from mapl.projectors import LearnedProjector

STAGE = Stage(
    hidden_size=64,
    rank=8,
    anchor_rank=16,
    vocab_size=300,
    tokens=50,
    sending=1,
    receiving=1,
    in_flight=3,
)


def storages(function: object) -> int:
    """Bytes of what autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # type: ignore[operator]
    assert result.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_is_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    projector = LearnedProjector(64, 8, generator)
    anchor = build_anchor(
        "factorized", vocab_size=300, hidden_size=64, anchor_rank=16, generator=generator
    ).bfloat16()
    ids = torch.randint(0, 300, (50, 1), generator=generator)
    x = torch.randn(50, 1, 64).bfloat16().requires_grad_()
    z = torch.randn(50, 1, 8).bfloat16().requires_grad_()
    coordinates = anchor.coordinates(ids)
    constant = projector.A.nbytes + anchor.basis.nbytes + anchor.E.nbytes
    sum_of = added(replace(STAGE, in_flight=1))
    sending = storages(lambda: encode(x, coordinates, anchor.basis, projector)) - constant
    assert sending == sum_of["activations"]
    receiving = storages(lambda: decode(z, coordinates, anchor.basis, projector)) - constant
    assert receiving == sum_of["latents"]
    order = coordinates.ids, *TokenOrder(coordinates.ids).ascending
    assert sum(tensor.nbytes for tensor in order) == sum_of["ids"]


def test_what_a_bigram_anchor_keeps_is_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    projector = LearnedProjector(64, 8, generator)
    anchor = build_anchor(
        "bigram", vocab_size=300, hidden_size=64, anchor_rank=16, generator=generator, buckets=200
    ).bfloat16()
    ids = torch.randint(0, 300, (50, 1), generator=generator, dtype=torch.int32)
    x = torch.randn(50, 1, 64).bfloat16().requires_grad_()
    coordinates = anchor.coordinates(ids, predecessors_of(ids))
    tables = anchor.E.nbytes + anchor.B.nbytes
    constant = projector.A.nbytes + anchor.basis.nbytes
    sum_of = added(replace(STAGE, in_flight=1, buckets=200))
    c = coordinates.table.nbytes
    kept = storages(lambda: encode(x, coordinates, anchor.basis, projector)) - constant
    assert kept == sum_of["activations"] + c
    buckets = bigram_buckets(ids, predecessors_of(ids), 200)
    order = coordinates.ids, buckets, *TokenOrder(buckets.flatten()).ascending
    assert c + sum(tensor.nbytes for tensor in order) == sum_of["coordinates"]
    table = tables // 2  # numbers
    assert sum_of["anchors"] == (18 + 2) * table + anchor.basis.nbytes


def test_operands_are_in_it() -> None:
    projector = LearnedProjector(64, 8, torch.Generator().manual_seed(0))
    basis, bf16 = torch.randn(16, 64), torch.bfloat16
    down = projector.operands.get("encode", projector.A, basis, bf16)
    up = projector.operands.get("decode", projector.A, basis, bf16)
    before_basis = torch.empty(16, 8)  # what `accumulate_product` sums with a basis
    total = down.nbytes + up.nbytes + before_basis.nbytes
    assert added(STAGE)["operands"] == total


def test_what_stays_is_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    projector = LearnedProjector(64, 8, generator)
    state = projector.A.nbytes + projector.momentum.nbytes + projector.grad.nbytes
    assert added(STAGE)["projectors"] == 2 * state
    anchor = build_anchor(
        "factorized", vocab_size=300, hidden_size=64, anchor_rank=16, generator=generator
    )
    table = sum(p.numel() for p in anchor.parameters())
    assert added(STAGE)["anchors"] == (18 + 2) * table + anchor.basis.nbytes


def test_ends_have_what_they_need() -> None:
    first = added(replace(STAGE, receiving=0))
    last = added(replace(STAGE, sending=0))
    assert first["latents"] == 0 < first["activations"]
    assert last["activations"] == 0 < last["latents"]
    assert first["projectors"] == last["projectors"] == added(STAGE)["projectors"] / 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((4, 0, 8), 4), ((4, 3, 8), 1), ((4, 0, 2), 2), ((2, 0, 8, 2), 5), ((2, 1, 8, 2), 3)],
)
def test_in_flight(arguments: tuple[int, ...], expected: int) -> None:
    assert in_flight(*arguments) == expected
