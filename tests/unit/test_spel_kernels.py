# SPDX-License-Identifier: Apache-2.0
"""The batched SPEL step against float64, and a projector's independence of its batch.

In Triton's interpreter, where there is no GPU, a step takes seconds; sizes and counts are small.
"""

import random
from contextlib import contextmanager

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS

from mapl import projectors
from mapl.ops.kernels import spel as spel_kernels
from mapl.ops.kernels.spel import POLAR_EXPRESS
from mapl.projectors import FixedProjector, LearnedProjector, UnconstrainedProjector
from mapl.spel import spel_step, step_all
from mapl.stiefel import orthonormality_error, random_stiefel
from test_spel import adversarial, reference_step


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")


@contextmanager
def poisoned_memory():
    """Whatever is allocated and not written reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def operands(seeds, d, r, device):
    """A, gradient and momentum of a projector for each seed."""
    a = [random_stiefel(d, r, seeded(seed)).to(device) for seed in seeds]
    grad = [torch.randn(d, r, generator=seeded(100 + seed)).to(device) for seed in seeds]
    momentum = [0.1 * torch.randn(d, r, generator=seeded(200 + seed)).to(device) for seed in seeds]
    return a, grad, momentum


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def relative_error(found, exact):
    return float((found.cpu().double() - exact).norm() / exact.norm())


def test_coefficients_are_those_of_msign():
    assert list(POLAR_EXPRESS) == _COEFFICIENT_SETS["polar_express"]


# Below a tile, just above one of square and tall products, above a Gram program's rows, one column.
@pytest.mark.parametrize("d,r", [(64, 16), (130, 67), (517, 33), (9, 1)])
def test_agrees_with_float64(d, r, device):
    lr, seeds = 0.1, [random.randrange(2**31)]
    a, grad, momentum = operands(seeds, d, r, device)
    exact = [
        reference_step(*(t.cpu().double() for t in one), lr, 0.9)
        for one in zip(a, grad, momentum, strict=True)
    ]
    with poisoned_memory():
        assert all(step_all(a, grad, momentum, lr))
    for found, found_momentum, expected in zip(a, momentum, exact, strict=True):
        assert relative_error(found_momentum, expected[1]) < 1e-6, seeds
        assert relative_error(found, expected[0]) < 3e-6, seeds
        assert orthonormality_error(found.cpu().double()) < 3e-6, seeds


def test_autograd_is_told_of_what_kernels_write(device):
    a, grad, momentum = operands([0], 24, 8, device)
    before = a[0]._version, momentum[0]._version
    step_all(a, grad, momentum, 0.1)
    assert a[0]._version > before[0] and momentum[0]._version > before[1]


def test_square_projectors(device):
    a, grad, momentum = operands([0], 24, 24, device)
    one = (tensors[0].cpu().double() for tensors in (a, grad, momentum))
    expected, _ = reference_step(*one, 0.1, 0.9)
    assert step_all(a, grad, momentum, 0.1)[0]
    assert relative_error(a[0], expected) < 1e-5


def test_the_batch_changes_no_bit_and_a_damaged_gradient_touches_its_own_projector_alone(device):
    d, r, steps = 40, 12, 100 if device.type == "cuda" else 2
    together = operands(range(3), d, r, device)
    together[1][1][3, 5] = float("nan")
    before = together[0][1].clone(), together[2][1].clone()
    alone = [copies(tensors[2:]) for tensors in together]
    for _ in range(steps):
        with poisoned_memory():
            ok = step_all(*together, 0.05)
            assert step_all(*alone, 0.05)[0]
        assert [bool(one) for one in ok] == [True, False, True]
        assert ok[0].dtype == torch.bool and ok[0].ndim == 0
    assert torch.equal(together[0][1], before[0]) and torch.equal(together[2][1], before[1])
    assert torch.equal(together[0][2], alone[0][0]) and torch.equal(together[2][2], alone[2][0])
    assert orthonormality_error(alone[0][0]) < 3e-6


def test_adversarial_gradients(device):
    d, r, lr, steps = 32, 8, 0.05, 50 if device.type == "cuda" else 1
    kinds = ["zero", "rank one", "one entry", "huge", "tiny", "normal to the manifold"]
    start = random_stiefel(d, r, seeded(0))
    a = [start.clone().to(device) for _ in kinds]
    grad = [adversarial(kind, d, r).to(device) for kind in kinds]
    momentum = [torch.zeros(d, r, device=device) for _ in kinds]
    expected = [spel_step(start, g.cpu(), torch.zeros(d, r), lr)[0] for g in grad]
    for step in range(steps):
        with poisoned_memory():
            assert all(step_all(a, grad, momentum, lr))
        assert all(orthonormality_error(matrix) < 3e-6 for matrix in a)
        if step == 0:
            for kind, found, reference in zip(kinds, a, expected, strict=True):
                # What lies below rounding is lifted by up to 6e3, and is noise in the reference
                # too; the last gradient has nothing else.
                if kind != "normal to the manifold":
                    assert (found.cpu() - reference).abs().max() < 2e-3 * lr, kind
    assert (a[0].cpu() - start).abs().max() < 1e-6


@pytest.mark.parametrize("damage", ["lr", "A", "overflow"])
def test_what_cannot_be_stepped_is_left_alone(damage, device):
    a, grad, momentum = operands([0], 24, 6, device)
    lr = torch.tensor(0.11 if damage == "lr" else 0.05, device=device)
    if damage == "A":
        a[0][2, 3] += 1
    elif damage == "overflow":
        grad[0] = a[0].sign() * torch.finfo(torch.float32).max
    before = a[0].clone(), momentum[0].clone()
    assert not step_all(a, grad, momentum, lr)[0]
    assert torch.equal(a[0], before[0]) and torch.equal(momentum[0], before[1])


def test_large_rates_take_the_reference(device):
    a, grad, momentum = operands([0], 24, 6, device)
    expected, expected_momentum, _ = spel_step(a[0], grad[0], momentum[0], 0.3)
    assert step_all(a, grad, momentum, 0.3)[0]
    assert torch.equal(a[0], expected) and torch.equal(momentum[0], expected_momentum)


def test_all_kinds_and_shapes_of_projectors(device):
    def build():
        return [
            LearnedProjector(24, 6, seeded(0)).to(device),
            FixedProjector(24, 6, seeded(1)).to(device),
            UnconstrainedProjector(24, 6, seeded(2)).to(device),
            LearnedProjector(24, 5, seeded(3)).to(device),
            LearnedProjector(24, 6, seeded(4)).to(device),
        ]

    together, apart = build(), build()
    for index, pair in enumerate(zip(together, apart, strict=True)):
        grad = torch.randn(pair[0].A.shape, generator=seeded(10 + index)).to(device)
        if index == 4:
            grad[0, 0] = float("inf")
        for projector in pair:
            projector.accumulate(grad)
    with poisoned_memory():
        ok = projectors.step_all(together, 0.05)
    assert [bool(one) for one in ok] == [True, True, True, True, False]
    for one, other in zip(together, apart, strict=True):
        other.step(0.05)
        assert torch.equal(one.A, other.A) and one.skipped_steps == other.skipped_steps
    assert together[4].skipped_steps == 1


def test_tables_of_offsets_do_not_grow_without_bound(device, monkeypatch):
    monkeypatch.setattr(spel_kernels, "_tables", {})
    monkeypatch.setattr(spel_kernels, "_MOST_TABLES", 3)
    numbers = torch.zeros(16, device=device)
    for at in (1, 2, 3, 4, 1, 4):
        first, table = spel_kernels._spread([numbers[:2], numbers[at : at + 2]])
        assert first.data_ptr() == numbers.data_ptr() and table.tolist() == [0, at]
    assert [offsets for offsets, _ in spel_kernels._tables] == [(0, 3), (0, 4), (0, 1)]


def test_on_a_cpu_all_is_each_by_spel_step(monkeypatch):
    monkeypatch.delenv("MAPL_OPS")
    a, grad, momentum = operands(range(3), 24, 6, "cpu")
    grad[1][0, 0] = float("nan")
    expected = [spel_step(*one, 0.05) for one in zip(a, grad, momentum, strict=True)]
    ok = step_all(a, grad, momentum, 0.05)
    for found in zip(a, momentum, ok, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found[:3], found[3], strict=True))
    assert step_all([], [], [], 0.05) == [] and projectors.step_all([], 0.05) == []


@pytest.mark.parametrize(
    "change,match",
    [
        ({"lr": 1.0}, "learning rate"),
        ({"lr": torch.zeros(1)}, "0-dim fp32"),
        ({"lr": torch.zeros((), dtype=torch.float64)}, "0-dim fp32"),
        ({"beta": 1.0}, "momentum"),
        ({"grad": [torch.zeros(4, 3)]}, "grad"),
        ({"grad": [torch.zeros(2, 4).mT]}, "contiguous"),
        ({"momentum": [torch.zeros(9)[1:].view(4, 2)]}, "16-byte aligned"),
    ],
)
def test_refuses(change, match, device):
    arguments = {
        "a": [torch.eye(4, 2)],
        "grad": [torch.zeros(4, 2)],
        "momentum": [torch.zeros(4, 2)],
        "lr": 0.1,
    }
    with pytest.raises(ValueError, match=match):
        step_all(**{name: _moved(value, device) for name, value in (arguments | change).items()})


def _moved(value, device):
    """The same on the device, its strides and its misalignment too."""
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.zeros(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype)
    moved = storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    return moved.copy_(value)


@pytest.mark.parametrize("shape,dtype", [((2, 4), torch.float32), ((4, 2), torch.float64)])
def test_refuses_matrices(shape, dtype, device):
    with pytest.raises(ValueError, match="fp32 with at least as many rows"):
        step_all(*([torch.zeros(shape, dtype=dtype, device=device)] for _ in range(3)), 0.1)
