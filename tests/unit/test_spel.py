# SPDX-License-Identifier: Apache-2.0
"""SPEL: staying on the manifold, agreeing with an SVD reference, reaching known optima."""

import pytest
import torch

from mapl.spel import Spel, spel_step
from mapl.stiefel import orthonormality_error, random_stiefel


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def reference_step(a, grad, momentum, lr, beta):
    """The four lines of the method, in fp64 with exact singular value decompositions."""
    inner = a.mT @ grad
    riemannian = grad - a @ (inner + inner.mT) / 2
    momentum = beta * momentum + (1 - beta) * riemannian
    return polar(a - lr * polar(momentum)), momentum


def gapped_covariance(d, r):
    """Eigenvalues 10…5 on a random r-dimensional space, at most 1 on the rest."""
    basis = random_stiefel(d, d, seeded(7)).double()
    values = torch.cat(
        [
            torch.linspace(10, 5, r, dtype=torch.float64),
            torch.linspace(1, 0.1, d - r, dtype=torch.float64),
        ]
    )
    return (basis * values) @ basis.mT, basis[:, :r], values[:r].sum()


@pytest.mark.parametrize("d,r", [(24, 6), (10, 1), (12, 12)])
def test_stays_on_the_manifold_for_3000_steps(d, r):
    generator = seeded(1)
    a, momentum = random_stiefel(d, r, seeded()), torch.zeros(d, r)
    worst = 0.0
    for _ in range(3000):
        grad = torch.randn(d, r, generator=generator)
        a, momentum, ok = spel_step(a, grad, momentum, lr=0.02)
        assert ok
        worst = max(worst, orthonormality_error(a).item())
    assert worst < 1e-5


@pytest.mark.parametrize("d,r,steps", [(1024, 256, 12), (192, 192, 24)])
def test_stays_on_the_manifold_at_larger_sizes(d, r, steps):
    generator = seeded(1)
    a, momentum = random_stiefel(d, r, seeded()), torch.zeros(d, r)
    for _ in range(steps):
        a, momentum, ok = spel_step(a, torch.randn(d, r, generator=generator), momentum, lr=0.1)
        assert ok and orthonormality_error(a) < 1e-5


def adversarial(kind, d, r):
    normal = torch.randn(d, r, generator=seeded(2))
    match kind:
        case "zero":
            return torch.zeros(d, r)
        case "rank one":
            return normal[:, :1] @ normal[:1, :]
        case "one entry":
            return torch.zeros(d, r).index_put(
                (torch.tensor(0), torch.tensor(0)), torch.tensor(1.0)
            )
        case "huge":
            return normal * 1e30
        case "tiny":
            return normal * 1e-30
        case "normal to the manifold":
            return random_stiefel(d, r, seeded())
    raise AssertionError(kind)


KINDS = ["zero", "rank one", "one entry", "huge", "tiny", "normal to the manifold"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d,r", [(32, 8), (16, 16), (9, 1)])
def test_adversarial_gradients(kind, d, r):
    a, momentum = random_stiefel(d, r, seeded()), torch.zeros(d, r)
    grad = adversarial(kind, d, r)
    for _ in range(50):
        a, momentum, ok = spel_step(a, grad, momentum, lr=0.05)
        assert ok and a.isfinite().all() and orthonormality_error(a) < 1e-5


# Powers of two, so that scaling itself rounds nothing.
@pytest.mark.parametrize("scale", [2.0**99, 2.0**-99])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    a, grad = random_stiefel(32, 8, seeded()), torch.randn(32, 8, generator=seeded(1))
    plain, _, _ = spel_step(a, grad, torch.zeros(32, 8), lr=0.1)
    scaled, _, _ = spel_step(a, grad * scale, torch.zeros(32, 8), lr=0.1)
    assert torch.equal(scaled, plain)


def test_a_zero_gradient_leaves_a_where_it_was():
    a = random_stiefel(32, 8, seeded())
    moved, momentum, ok = spel_step(a, torch.zeros(32, 8), torch.zeros(32, 8), lr=0.1)
    assert ok and not momentum.any()
    torch.testing.assert_close(moved, a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(value):
    a, momentum = random_stiefel(32, 8, seeded()), torch.randn(32, 8, generator=seeded(1))
    grad = torch.randn(32, 8, generator=seeded(2))
    grad[3, 5] = value
    new_a, new_momentum, ok = spel_step(a, grad, momentum, lr=0.1)
    assert ok.dtype == torch.bool and ok.ndim == 0 and not ok
    assert torch.equal(new_a, a) and torch.equal(new_momentum, momentum)


def test_a_gradient_that_overflows_is_skipped():
    a = random_stiefel(64, 1, seeded())
    grad = a.sign() * torch.finfo(torch.float32).max
    new_a, new_momentum, ok = spel_step(a, grad, torch.zeros(64, 1), lr=0.1)
    assert not ok and torch.equal(new_a, a) and not new_momentum.any()


@pytest.mark.parametrize("d,r", [(64, 8), (20, 1), (256, 64)])
@pytest.mark.parametrize("lr", [0.002, 0.3])
def test_agrees_with_an_svd_reference(d, r, lr):
    generator = seeded(3)
    a, momentum = random_stiefel(d, r, seeded()), torch.zeros(d, r)
    exact_a, exact_momentum = a.double(), momentum.double()
    for _ in range(5):
        grad = torch.randn(d, r, generator=generator)
        a, momentum, _ = spel_step(a, grad, momentum, lr, beta=0.8)
        exact_a, exact_momentum = reference_step(exact_a, grad.double(), exact_momentum, lr, 0.8)
    torch.testing.assert_close(a.double(), exact_a, rtol=0, atol=5e-6)
    torch.testing.assert_close(momentum.double(), exact_momentum, rtol=0, atol=5e-6)


def test_inputs_are_not_mutated():
    arguments = [torch.randn(16, 4, generator=seeded(i)) for i in range(3)]
    arguments[0] = random_stiefel(16, 4, seeded())
    before = [t.clone() for t in arguments]
    spel_step(*arguments, lr=0.1)
    arguments[1][0, 0] = before[1][0, 0] = float("inf")
    spel_step(*arguments, lr=0.1)
    assert all(torch.equal(t, b) for t, b in zip(arguments, before, strict=True))


def test_momentum_carries_on():
    a, grad = random_stiefel(32, 4, seeded()), torch.randn(32, 4, generator=seeded(1))
    a1, momentum, _ = spel_step(a, grad, torch.zeros(32, 4), lr=0.05)
    coasting, decayed, _ = spel_step(a1, torch.zeros(32, 4), momentum, lr=0.05)
    assert (coasting - a1).norm() > 0.05
    torch.testing.assert_close(decayed, 0.9 * momentum)
    still, _, _ = spel_step(a1, torch.zeros(32, 4), momentum, lr=0.05, beta=0.0)
    torch.testing.assert_close(still, a1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d,r", [(40, 5), (24, 1), (64, 16)])
def test_finds_the_top_subspace(d, r):
    covariance, top, best = gapped_covariance(d, r)
    a, momentum = random_stiefel(d, r, seeded()), torch.zeros(d, r)
    steps = 400
    for step in range(steps):
        grad = (-2 * covariance @ a.double()).float()
        a, momentum, _ = spel_step(a, grad, momentum, lr=0.1 * (1 - step / steps))
    energy = torch.trace(a.double().mT @ covariance @ a.double())
    assert energy > 0.99 * best
    smallest_cosine = torch.linalg.svdvals(a.double().mT @ top).min()
    assert torch.rad2deg(torch.acos(smallest_cosine.clamp(max=1.0))) < 3.0


@pytest.mark.parametrize(
    "change,match",
    [
        ({"lr": 1.0}, "learning rate"),
        ({"lr": -0.1}, "learning rate"),
        ({"lr": float("nan")}, "learning rate"),
        ({"beta": 1.0}, "momentum"),
        ({"grad": torch.zeros(4, 3)}, "grad"),
        ({"grad": torch.zeros(4, 2).double()}, "grad"),
        ({"momentum": torch.zeros(2, 4)}, "momentum"),
    ],
)
def test_refuses(change, match):
    arguments = {
        "a": torch.eye(4, 2),
        "grad": torch.zeros(4, 2),
        "momentum": torch.zeros(4, 2),
        "lr": 0.1,
    }
    with pytest.raises(ValueError, match=match):
        spel_step(**(arguments | change))


def test_optimizer_is_spel_step():
    param = torch.nn.Parameter(random_stiefel(16, 4, seeded()))
    optimizer = Spel([param], lr=0.05, momentum=0.8)
    a, momentum = param.detach().clone(), torch.zeros(16, 4)
    for seed in range(5):
        param.grad = torch.randn(16, 4, generator=seeded(seed))
        optimizer.step()
        a, momentum, _ = spel_step(a, param.grad, momentum, 0.05, 0.8)
    assert torch.equal(param.detach(), a)


def test_optimizer_skips_and_counts_through_a_checkpoint():
    param = torch.nn.Parameter(random_stiefel(16, 4, seeded()))
    optimizer = Spel([param], lr=0.05)
    param.grad = torch.full((16, 4), float("nan"))
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param.detach(), before) and optimizer.skipped_steps() == 1
    restored = Spel([param], lr=0.05)
    restored.load_state_dict(optimizer.state_dict())
    restored.step()
    assert restored.skipped_steps() == 2
    assert restored.state[param]["skipped_steps"].dtype == torch.int64


def test_optimizer_with_closure_and_without_gradient():
    param = torch.nn.Parameter(random_stiefel(16, 4, seeded()))
    target = random_stiefel(16, 4, seeded(1))
    optimizer = Spel([param], lr=0.05)
    optimizer.step()
    assert torch.equal(param.detach(), random_stiefel(16, 4, seeded()))

    def closure():
        optimizer.zero_grad()
        loss = (param - target).square().sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 3), torch.eye(3).bfloat16()])
def test_optimizer_refuses(bad):
    with pytest.raises(ValueError, match="fp32 matrices"):
        Spel([torch.nn.Parameter(bad)])


@pytest.mark.parametrize("change", [{"lr": 1.5}, {"momentum": -0.1}])
def test_optimizer_refuses_rates(change):
    with pytest.raises(ValueError, match="must lie in"):
        Spel([torch.nn.Parameter(torch.eye(3))], **change)
