# SPDX-License-Identifier: Apache-2.0
"""The constraint of Subspace Networks: a projection, onto span U, and nothing but that."""

import pytest
import torch

from mapl.anchors import build_anchor
from mapl.config import MaplConfig
from mapl.projectors import PROJECTORS, FixedProjector
from mapl.stiefel import random_stiefel
from mapl.subspace import departure, project_

SIZES = [(8, 1, 5), (64, 16, 33), (12, 12, 7), (33, 8, 1), (256, 32, 64)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subspace(d: int, k: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """U, orthonormal to the precision of its dtype."""
    return torch.linalg.qr(random_stiefel(d, k, seeded()).to(dtype))[0]


def weight(d: int, n: int, dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (d, n) if dim == 0 else (n, d)
    return torch.randn(shape, generator=seeded(1), dtype=dtype)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("d", "k", "n"), SIZES)
def test_it_is_the_orthogonal_projection(d: int, k: int, n: int, dim: int) -> None:
    u, w = subspace(d, k), weight(d, n, dim)
    p = w.clone()
    project_(p, u, dim)
    columns, inside = (w, p) if dim == 0 else (w.mT, p.mT)
    # The nearest in span U, as least squares finds it, which knows no U Uᵀ.
    nearest = u @ torch.linalg.lstsq(u, columns).solution
    torch.testing.assert_close(inside, nearest, rtol=0, atol=1e-12)
    again = p.clone()
    project_(again, u, dim)
    torch.testing.assert_close(again, p, rtol=0, atol=1e-13)
    # What is outside is orthogonal to all of U.
    assert (u.mT @ (columns - inside)).abs().max() < 1e-12
    assert departure(p, u, dim) < 1e-14


@pytest.mark.parametrize("dim", [0, 1])
def test_departure_is_the_sine_of_the_angle(dim: int) -> None:
    u, w = subspace(64, 16), weight(64, 9, dim)
    inside = w.clone()
    project_(inside, u, dim)
    outside = w - inside
    mixed = 3 * inside / inside.norm() + 4 * outside / outside.norm()
    kept = mixed.clone()
    assert departure(mixed, u, dim).item() == pytest.approx(0.8, abs=1e-12)
    assert torch.equal(mixed, kept)
    assert departure(torch.zeros_like(w), u, dim) == 0
    assert departure(outside, u, dim).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dim", [0, 1])
def test_in_fp32_a_second_projection_stays_within_rounding(dim: int) -> None:
    u = random_stiefel(1024, 128, seeded())  # as boundaries draw it
    w = weight(1024, 300, dim, torch.float32)
    assert departure(w, u, dim) > 0.5
    project_(w, u, dim)
    assert departure(w, u, dim) < 1e-6


def test_views_and_parameters_are_changed_in_place() -> None:
    """As the distributed optimizer holds a weight: a part of a flat buffer."""
    u = subspace(8, 2, torch.float32)
    buffer = torch.randn(100, generator=seeded(2))
    before = buffer.clone()
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data = buffer[10:34].view(8, 3)
    project_(parameter.detach(), u, 0)
    torch.testing.assert_close(buffer[10:34].view(8, 3), u @ (u.mT @ before[10:34].view(8, 3)))
    assert torch.equal(buffer[:10], before[:10]) and torch.equal(buffer[34:], before[34:])


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "message"),
    [
        ((8, 3), 1, torch.float32, "does not fit dimension 1"),
        ((3, 8), 0, torch.float32, "does not fit dimension 0"),
        ((8,), 0, torch.float32, "does not fit"),
        ((8, 8), 2, torch.float32, "does not fit dimension 2"),
        ((8, 3), 0, torch.bfloat16, "bfloat16, U is torch.float32"),
    ],
)
def test_what_does_not_fit(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        project_(torch.zeros(shape, dtype=dtype), subspace(8, 2, torch.float32), dim)


def test_the_projector_is_fixed_and_the_table_a_standard_normal() -> None:
    assert PROJECTORS["subspace"] is FixedProjector
    for projector, std in (("subspace", 1.0), ("fixed", 0.02)):
        config = MaplConfig(rank=[8], projector=projector, anchor="static")
        anchor = build_anchor(
            config.anchor,
            vocab_size=2000,
            hidden_size=64,
            anchor_rank=1,
            generator=seeded(3),
            static_std=config.static_anchor_std,
        )
        assert anchor.table.std().item() == pytest.approx(std, rel=0.02)
