# SPDX-License-Identifier: Apache-2.0
"""Projectors: one suite over all of them, then what each does alone."""

import copy

import pytest
import torch
from torch import nn

from mapl.projectors import PROJECTORS, FixedProjector, LearnedProjector, UnconstrainedProjector
from mapl.spel import spel_step
from mapl.stiefel import msign, orthonormality_error, random_stiefel

LEARNING = [LearnedProjector, UnconstrainedProjector]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(seed, d=24, r=6):
    return torch.randn(d, r, generator=seeded(seed))


def test_names():
    assert {
        "learned": LearnedProjector,
        "fixed": FixedProjector,
        "unconstrained": UnconstrainedProjector,
        "subspace": FixedProjector,
    } == PROJECTORS


@pytest.mark.parametrize("kind", PROJECTORS)
def test_starts_on_the_manifold_and_outside_other_optimizers(kind):
    projector = PROJECTORS[kind](24, 6, seeded())
    assert torch.equal(projector.A, random_stiefel(24, 6, seeded()))
    assert not projector.A.requires_grad and projector.A.dtype == torch.float32
    assert projector.skipped_steps.dtype == torch.int64 and projector.skipped_steps == 0
    expected = {"A"} if kind in ("fixed", "subspace") else {"A", "momentum"}
    assert set(projector.state_dict()) == expected


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.bfloat16),
    ],
)
def test_a_cast_of_the_model_changes_no_bit(kind, cast):
    projector = PROJECTORS[kind](24, 6, seeded())
    projector.accumulate(gradient(1))
    projector.step(0.1)
    tensors = [t for t in (projector.A, projector.momentum, projector.grad) if t is not None]
    before = [t.clone() for t in tensors]
    model = cast(nn.Sequential(nn.Linear(3, 3), projector))
    assert model[0].weight.dtype != torch.float32
    after = [t for t in (projector.A, projector.momentum, projector.grad) if t is not None]
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float32 and torch.equal(old, new)
    assert projector.skipped_steps.dtype == torch.int64
    assert isinstance(projector.A, nn.Parameter) and not projector.A.requires_grad


@pytest.mark.parametrize("kind", PROJECTORS)
def test_follows_the_device(kind):
    projector = PROJECTORS[kind](24, 6, seeded()).to("meta", torch.bfloat16)
    tensors = [projector.A, projector.momentum, projector.grad, projector.skipped_steps]
    assert all(t.is_meta for t in tensors if t is not None)
    assert projector.A.dtype == torch.float32
    assert projector.to_empty(device="cpu").A.device.type == "cpu"


@pytest.mark.parametrize("kind", PROJECTORS)
def test_copies_and_state_dicts(kind):
    projector = PROJECTORS[kind](24, 6, seeded())
    projector.accumulate(gradient(1))
    projector.step(0.1)
    duplicate = copy.deepcopy(projector)
    other = PROJECTORS[kind](24, 6, seeded(9))
    other.load_state_dict(projector.state_dict())
    for twin in (duplicate, other):
        twin.zero_grad()
        twin.accumulate(gradient(2))
        twin.step(0.1)
        assert not twin.learns or not torch.equal(twin.A, projector.A)
    assert torch.equal(duplicate.A, other.A)


@pytest.mark.parametrize("cls", LEARNING)
def test_accumulates(cls):
    projector = cls(24, 6, seeded())
    accumulator = projector.grad
    projector.accumulate(gradient(1))
    projector.accumulate(gradient(2))
    torch.testing.assert_close(projector.grad, gradient(1) + gradient(2))
    projector.zero_grad()
    assert projector.grad is accumulator and not projector.grad.any()
    with pytest.raises(ValueError, match="shape"):
        projector.accumulate(torch.ones(1, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [1, -1, 0.5])
@pytest.mark.parametrize("with_basis", [False, True])
def test_accumulates_products(with_basis, alpha, dtype, device):
    projector = LearnedProjector(16, 4, torch.Generator().manual_seed(0)).to(device)
    basis = torch.randn(8, 16, device=device).to(dtype) if with_basis else None
    expected = torch.zeros(16, 4, dtype=torch.float64, device=device)
    for factor in (1, alpha):
        left = torch.randn(24, 8 if with_basis else 16, device=device).to(dtype)
        right = torch.randn(24, 4, device=device).to(dtype)
        given = left.clone()
        projector.accumulate_product(left, right, basis, alpha=factor)
        assert torch.equal(left, given)
        product = left.double().mT @ right.double()
        expected += factor * (product if basis is None else basis.double().mT @ product)
    torch.testing.assert_close(projector.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_model_is_zeroed_apart():
    projector = LearnedProjector(24, 6, seeded())
    projector.accumulate(gradient(1))
    nn.Sequential(projector).zero_grad()
    assert projector.grad.any()


def test_learned_is_spel():
    projector = LearnedProjector(24, 6, seeded())
    storage = projector.A.data_ptr(), projector.momentum.data_ptr()
    a, momentum = projector.A.clone(), projector.momentum.clone()
    for seed in range(4):
        projector.zero_grad()
        projector.accumulate(gradient(seed))
        assert projector.step(0.1)
        a, momentum, _ = spel_step(a, gradient(seed), momentum, 0.1)
    assert torch.equal(projector.A, a) and torch.equal(projector.momentum, momentum)
    assert storage == (projector.A.data_ptr(), projector.momentum.data_ptr())


def test_unconstrained_is_muon():
    projector = UnconstrainedProjector(24, 6, seeded())
    a, momentum = projector.A.clone(), torch.zeros(24, 6)
    for seed in range(4):
        projector.zero_grad()
        projector.accumulate(gradient(seed))
        assert projector.step(0.1)
        momentum = 0.9 * momentum + 0.1 * gradient(seed)
        a = a - 0.1 * msign(momentum)
    torch.testing.assert_close(projector.A.data, a)
    assert orthonormality_error(projector.A) > 0.01


def test_fixed_never_moves():
    projector = FixedProjector(24, 6, seeded())
    before = projector.A.clone()
    projector.accumulate(gradient(1))
    projector.zero_grad()
    assert projector.step(0.5) and torch.equal(projector.A, before)
    assert projector.grad is None and projector.momentum is None and not projector.learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [*LEARNING, FixedProjector])
def test_both_sides_restart_from_what_one_proposes(cls, dtype):
    """With what step and products left behind, and proposals that are rounded as they cross."""
    sender, receiver = cls(24, 6, seeded()), cls(24, 6, seeded())
    chosen = random_stiefel(24, 6, seeded(7))
    for side, seed in ((sender, 1), (receiver, 2)):
        accumulator = side.grad
        side.accumulate(gradient(seed))
        side.step(0.1)
        side.accumulate_product(gradient(3, 9, 4), gradient(4, 9), torch.randn(4, 24))
        side.operands.get("encode", side.A, None, torch.float32)
        side.propose(chosen if side is sender else None)
    total = sum(side.grad.to(dtype).float() for side in (sender, receiver))
    for side in (sender, receiver):
        side.grad.copy_(total)
        side.restart()
    assert torch.equal(sender.A, receiver.A)
    assert orthonormality_error(sender.A) < 1e-6
    rounding = 1e-6 if dtype is torch.float32 else 4e-3
    assert (sender.A - chosen).abs().max() < rounding
    assert torch.equal(sender.operands.get("encode", sender.A, None, torch.float32), sender.A)
    started = sender.A.clone()
    if not sender.learns:
        assert sender.grad is None and torch.equal(started, sender.A)
        return
    assert receiver.grad is accumulator
    for side in (sender, receiver):
        assert not side.grad.any() and not side.momentum.any()
        assert side.step(0.1) and side.skipped_steps == 0 and not side.momentum.any()
    assert torch.equal(sender.A, receiver.A)
    # Eight iterations of products in fp32, which processors round differently: 1.28e-6 was seen.
    assert (sender.A - started).abs().max() < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cls", LEARNING)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skips_and_counts(cls, value):
    projector = cls(24, 6, seeded())
    projector.accumulate(gradient(1))
    projector.step(0.1)
    a, momentum = projector.A.clone(), projector.momentum.clone()
    projector.grad[0, 0] = value
    for count in (1, 2):
        assert not projector.step(0.1)
        assert projector.skipped_steps == count
    assert torch.equal(projector.A, a) and torch.equal(projector.momentum, momentum)
    projector.zero_grad()
    projector.accumulate(gradient(2))
    assert projector.step(0.1) and projector.skipped_steps == 2
    assert not torch.equal(projector.A, a)


@pytest.mark.parametrize("cls", LEARNING)
@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_refuses_rates(cls, lr):
    projector = cls(24, 6, seeded())
    with pytest.raises(ValueError, match="learning rate"):
        projector.step(lr)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_refuses_ranks(kind):
    with pytest.raises(ValueError, match="rank 9"):
        PROJECTORS[kind](8, 9, seeded())


@pytest.mark.parametrize("cls", LEARNING)
def test_both_sides_stay_bitwise_equal_over_500_steps(cls):
    sender, receiver = cls(32, 8, seeded(5)), cls(32, 8, seeded(5))
    generator = seeded(6)
    start = sender.A.clone()
    for step in range(500):
        parts = torch.randn(2, 32, 8, generator=generator)
        if step == 250:
            parts[1, 0, 0] = float("nan")
        for side in (sender, receiver):
            side.zero_grad()
            side.accumulate(parts[0] + parts[1])
            side.step(0.02)
    assert torch.equal(sender.A, receiver.A) and torch.equal(sender.momentum, receiver.momentum)
    assert sender.skipped_steps == receiver.skipped_steps == 1
    assert (sender.A - start).norm() > 0.1
