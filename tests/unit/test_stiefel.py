# SPDX-License-Identifier: Apache-2.0
"""Stiefel manifold: msign against SVD, retraction, tangent space, sampling, checks."""

import numpy as np
import pytest
import torch

from mapl.fp32 import full_precision
from mapl.stiefel import (
    check,
    msign,
    nearest_basis,
    orthonormality_error,
    random_stiefel,
    retract,
    tangent,
)

SHAPES = [(1, 1), (5, 1), (7, 3), (64, 16), (16, 64), (33, 33), (1024, 256)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def polar(x):
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def conditioned(m, n, smallest=0.05):
    """A matrix whose singular values lie evenly in [smallest, 1]."""
    u, _, vh = torch.linalg.svd(
        torch.randn(m, n, generator=seeded(), dtype=torch.float64), full_matrices=False
    )
    return ((u * torch.linspace(smallest, 1, min(m, n), dtype=torch.float64)) @ vh).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_msign_is_the_polar_factor(shape, scale):
    x = conditioned(*shape) * scale
    result = msign(x)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result.double(), polar(x), rtol=0, atol=5e-6)


def test_msign_of_extreme_scales():
    x = conditioned(20, 4)
    largest = x / x.abs().max() * torch.finfo(torch.float32).max
    torch.testing.assert_close(msign(largest).double(), polar(x), rtol=0, atol=5e-6)
    assert torch.equal(msign(torch.zeros(6, 3)), torch.zeros(6, 3))
    assert msign(torch.full((6, 3), float("nan"))).isnan().all()


def test_msign_leaves_its_input_alone():
    x = conditioned(20, 4)
    before = x.clone()
    msign(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2).double(), torch.ones(2, 2, 2)])
def test_msign_refuses(bad):
    with pytest.raises(ValueError, match="fp32 matrix"):
        msign(bad)


def test_msign_refuses_no_steps():
    with pytest.raises(ValueError, match="steps=0"):
        msign(torch.ones(2, 2), steps=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_msign_is_exact_under_any_matmul_precision(precision):
    x = conditioned(64, 16)
    expected = msign(x)
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(msign(x), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_msign_is_exact_under_autocast():
    x = conditioned(64, 16)
    expected = msign(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(msign(x), expected)


def test_full_precision_restores_the_per_backend_setting():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        # From here on the legacy getter raises, which must not reach the user.
        matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(KeyError), full_precision(torch.device("cpu")):
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("d,r", [(1, 1), (9, 1), (48, 16), (32, 32)])
def test_random_stiefel(d, r):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = random_stiefel(d, r, seeded(3))
    assert a.shape == (d, r) and a.dtype == torch.float32 and a.is_contiguous()
    assert orthonormality_error(a.double()) < 1e-6
    assert torch.equal(a, random_stiefel(d, r, seeded(3)))
    assert torch.equal(torch.get_rng_state(), state)
    if d > 1:
        assert not torch.equal(a, random_stiefel(d, r, seeded(4)))


def test_random_stiefel_advances_its_generator():
    generator = seeded()
    first = random_stiefel(8, 2, generator)
    assert not torch.equal(first, random_stiefel(8, 2, generator))


def test_random_stiefel_has_the_sign_of_gram_schmidt():
    a = random_stiefel(16, 4, seeded(5)).double()
    normal = torch.randn(4, 16, generator=seeded(5), dtype=torch.float64).mT
    assert ((a.mT @ normal).diagonal() > 0).all()


@pytest.mark.parametrize("r", [0, 5, -1])
def test_random_stiefel_refuses_ranks(r):
    with pytest.raises(ValueError, match=f"rank {r}"):
        random_stiefel(4, r, seeded())


@pytest.mark.parametrize("d,r", [(12, 1), (32, 8), (16, 16)])
def test_tangent_projects_onto_the_tangent_space(d, r):
    a = torch.linalg.qr(torch.randn(d, r, generator=seeded(), dtype=torch.float64)).Q
    g = torch.randn(d, r, generator=seeded(1), dtype=torch.float64)
    projected = tangent(a, g)
    symmetric = a.mT @ projected + projected.mT @ a
    assert symmetric.abs().max() < 1e-12
    torch.testing.assert_close(tangent(a, projected), projected)
    # What was taken off is orthogonal to what is left.
    assert ((g - projected) * projected).sum().abs() < 1e-12


def test_tangent_survives_huge_gradients():
    a = random_stiefel(64, 8, seeded())
    g = torch.randn(64, 8, generator=seeded(1)) * 1e36
    assert tangent(a, g).isfinite().all()


@pytest.mark.parametrize("d,r", [(6, 1), (64, 16), (128, 128), (1024, 256)])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.5, 0.9])
def test_retract_reaches_the_manifold(d, r, lr):
    a = random_stiefel(d, r, seeded())
    moved = a - lr * msign(torch.randn(d, r, generator=seeded(1)))
    assert orthonormality_error(retract(moved).double()) < 2e-6


def test_retract_is_the_nearest_point():
    a = random_stiefel(64, 16, seeded())
    moved = a + 0.02 * torch.randn(64, 16, generator=seeded(1))
    torch.testing.assert_close(retract(moved).double(), polar(moved), rtol=0, atol=2e-6)
    torch.testing.assert_close(retract(a), a, rtol=0, atol=1e-6)


def test_retract_at_full_size():
    a = random_stiefel(4096, 256, seeded())
    moved = a - 0.1 * msign(torch.randn(4096, 256, generator=seeded(1)))
    assert orthonormality_error(retract(moved)) < 1e-5


def test_retract_refuses_wide_matrices():
    with pytest.raises(ValueError, match="more columns than rows"):
        retract(torch.ones(2, 3))


def bases_of_a_span(d, r):
    """V, and A as it was drawn, of which V keeps some directions and has almost lost others."""
    v = random_stiefel(d, r, seeded(5)).double()
    return torch.linalg.qr(v).Q, random_stiefel(d, r, seeded(6))


@pytest.mark.parametrize(("d", "r"), [(24, 1), (24, 6), (24, 24), (256, 80)])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["orthonormal", "unconstrained"])
def test_nearest_basis(d, r, scale):
    """Of the same span, the same for any V of it, and no rotation of it is nearer to A."""
    v, a = bases_of_a_span(d, r)
    a = scale * a
    found = nearest_basis(v, a)
    assert found.dtype == torch.float64 and found.shape == (d, r)
    assert orthonormality_error(found) < 1e-12
    torch.testing.assert_close(found @ found.mT, v @ v.mT, rtol=0, atol=1e-12)
    left, _, right = np.linalg.svd(v.numpy().T @ a.double().numpy())
    expected = torch.from_numpy(v.numpy() @ (left @ right))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    inner = found.mT @ a.double()  # symmetric and semidefinite if and only if none is nearer
    torch.testing.assert_close(inner, inner.mT, rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(inner).min() > -1e-12
    for seed in range(3):
        other = v @ random_stiefel(r, r, seeded(seed)).double()
        assert (other - a).norm() >= (found - a).norm() - 1e-7
        torch.testing.assert_close(
            nearest_basis(torch.linalg.qr(other).Q, a), found, rtol=0, atol=1e-9
        )


def test_nearest_basis_of_a_span_that_has_a_is_a():
    _, a = bases_of_a_span(24, 6)
    q = torch.linalg.qr(a.double()).Q
    torch.testing.assert_close(nearest_basis(q, a), a.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lost", [1, 6])
def test_nearest_basis_beside_directions_that_are_lost(lost):
    """V has nothing of some of A's directions: VᵀA is singular, the basis orthonormal still."""
    q = torch.linalg.qr(random_stiefel(24, 12, seeded(7)).double()).Q
    a = q[:, :6]
    v = torch.cat((q[:, lost:6], q[:, 6 : 6 + lost]), dim=1)
    found = nearest_basis(v, a)
    assert orthonormality_error(found) < 1e-12
    torch.testing.assert_close(found @ found.mT, v @ v.mT, rtol=0, atol=1e-12)
    nearest = 2.0 * lost  # of norms² alone, without what both have
    torch.testing.assert_close((found - a).square().sum().item(), nearest, rtol=1e-9, atol=0)


def test_orthonormality_error_is_the_largest_entry():
    a = torch.eye(5, 3) * torch.tensor([1.0, 2.0, 1.0])
    error = orthonormality_error(a)
    assert error.ndim == 0 and error == 3.0


def test_check():
    a = random_stiefel(32, 8, seeded())
    check(a)
    with pytest.raises(RuntimeError, match=r"boundary 3.*retract"):
        check(a.bfloat16().float(), name="boundary 3")
    check(a.bfloat16().float(), tolerance=0.1)
    with pytest.raises(RuntimeError, match="nan"):
        check(torch.full((4, 2), float("nan")))


def test_a_smaller_rank_from_the_same_seed_spans_a_part_of_a_larger_one() -> None:
    """Boundaries of different ranks start from nested subspaces."""
    small, large = (random_stiefel(64, rank, torch.Generator().manual_seed(3)) for rank in (8, 24))
    assert (large @ (large.T @ small) - small).abs().max() < 1e-6
