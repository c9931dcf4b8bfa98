# SPDX-License-Identifier: Apache-2.0
"""Geometry: figures of data whose answers are known, and what must hold of any data."""

import math

import numpy
import pytest
import torch
from torch import Tensor

from mapl.anchors import build_anchor
from mapl.boundary import energy_kept
from mapl.coordinates import Coordinates
from mapl.geometry import (
    MOST_SAMPLED,
    Geometry,
    add_second_moment,
    anchored_residual,
    angles_between,
    best_energy,
    cosine_pearson,
    leading_directions,
    mean,
    measure,
    rank_for_energy,
    sampled,
    second_moment,
    spectrum,
    subspace_energy,
)
from mapl.projectors import FixedProjector
from mapl.stiefel import random_stiefel


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def orthonormal(d: int, r: int, seed: int = 2) -> Tensor:
    return torch.linalg.qr(normal(d, r, seed=seed)).Q


def with_energies(energies: list[float], n: int = 40) -> tuple[Tensor, Tensor]:
    """Rows [n, d] whose second moment has these eigenvalues, and its eigenvectors as columns."""
    d = len(energies)
    directions = orthonormal(d, d, seed=3)
    scale = torch.tensor(energies, dtype=torch.float64).sqrt()
    return orthonormal(n, d, seed=4) * scale @ directions.mT, directions


ENERGIES = [50.0, 30.0, 15.0, 3.0, 1.5, 0.5]


def test_spectrum_of_known_energies() -> None:
    rows, _ = with_energies(ENERGIES)
    eigenvalues = spectrum(second_moment(rows))
    torch.testing.assert_close(eigenvalues, torch.tensor(ENERGIES, dtype=torch.float64))
    assert best_energy(eigenvalues, 2) == pytest.approx(0.8, rel=1e-12)
    assert best_energy(eigenvalues, 6) == pytest.approx(1.0, rel=1e-12)
    for part, rank in ((0.4, 1), (0.6, 2), (0.94, 3), (0.97, 4), (0.99, 5), (0.996, 6)):
        assert rank_for_energy(eigenvalues, part) == rank


def test_second_moment_sums_all_rows_in_fp64() -> None:
    rows = normal(5000, 3).float()
    moment = second_moment(rows)
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, rows.double().mT @ rows.double(), rtol=1e-12, atol=0)


def test_second_moments_add_up() -> None:
    """That of all micro-batches of a step is that of their rows together."""
    rows = normal(70, 5)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for part in rows.split(20):
        add_second_moment(total, part)
    torch.testing.assert_close(total, rows.mT @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_leading_directions_of_known_energies(r: int) -> None:
    rows, directions = with_energies(ENERGIES)
    found = leading_directions(second_moment(rows), r)
    expected = directions[:, :r]
    torch.testing.assert_close(found, expected * (expected * found).sum(0).sign())
    kept = subspace_energy(second_moment(rows), found)
    assert kept == pytest.approx(sum(ENERGIES[:r]) / sum(ENERGIES), rel=1e-12)


def test_leading_directions_of_less_data_than_rank() -> None:
    """Two tokens: the rest of the basis is orthonormal whatever it is."""
    rows = normal(2, 8)
    found = leading_directions(second_moment(rows), 4)
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64))
    assert subspace_energy(second_moment(rows), found[:, :2]) == pytest.approx(1.0, rel=1e-12)


def test_a_small_tail_beside_a_large_direction_is_not_lost() -> None:
    """Squared, it is 1e-10 of the largest, which fp32 would round away."""
    rows, _ = with_energies([1.0, *[1e-10] * 5])
    eigenvalues = spectrum(second_moment(rows))
    torch.testing.assert_close(eigenvalues[1:], torch.full((5,), 1e-10).double(), rtol=1e-4, atol=0)
    # 0.99 of what is left without the first.
    assert rank_for_energy(eigenvalues[1:], 0.99) == 5


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_rank_of_low_rank_data(rank: int) -> None:
    """Directions of equal energy: 99% of it needs all of them, and no more."""
    rows = orthonormal(50, rank, seed=5) @ orthonormal(20, rank, seed=6).mT
    eigenvalues = spectrum(second_moment(rows))
    assert rank_for_energy(eigenvalues, 0.99) == rank
    assert best_energy(eigenvalues, rank) == pytest.approx(1.0, rel=1e-12)


def test_energy_of_known_subspaces() -> None:
    rows, directions = with_energies(ENERGIES)
    moment = second_moment(rows)
    assert subspace_energy(moment, directions[:, [1, 3]]) == pytest.approx(0.33, rel=1e-12)
    assert subspace_energy(moment, torch.eye(6)) == pytest.approx(1.0, rel=1e-12)
    # A's scale and basis do not matter, only its column space.
    mixed = directions[:, [1, 3]] @ torch.tensor([[2.0, 1.0], [0.0, 0.1]]).double()
    assert subspace_energy(moment, mixed) == pytest.approx(0.33, rel=1e-12)


def test_no_subspace_keeps_more_than_the_best_and_random_ones_r_of_d_on_average() -> None:
    rows, directions = with_energies([float(2**-i) for i in range(16)])
    moment = second_moment(rows)
    best = best_energy(spectrum(moment), 4)
    kept = [subspace_energy(moment, random_stiefel(16, 4, seeded(seed))) for seed in range(400)]
    assert max(kept) < best
    assert subspace_energy(moment, directions[:, :4]) == pytest.approx(best, rel=1e-12)
    assert sum(kept) / len(kept) == pytest.approx(4 / 16, abs=0.02)


def test_pearson_of_kept_lengths_and_angles_is_1() -> None:
    rows = normal(30, 8)
    assert cosine_pearson(rows, rows) == pytest.approx(1.0, rel=1e-12)
    assert cosine_pearson(rows, rows @ orthonormal(8, 8)) == pytest.approx(1.0, rel=1e-12)
    inside = normal(30, 3) @ orthonormal(8, 3).mT
    assert cosine_pearson(inside, inside @ orthonormal(8, 3)) == pytest.approx(1.0, rel=1e-12)


def test_pearson_by_hand() -> None:
    """Cosines before: 1/√2, 0, 1/√2. After, on the first axis alone with signs: 1, −1, −1."""
    before = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double()
    after = torch.tensor([[1.0], [2.0], [-1.0]]).double()
    half = math.sqrt(0.5)
    expected = numpy.corrcoef([half, 0.0, half], [1.0, -1.0, -1.0])[0, 1]
    assert expected == pytest.approx(0.5)
    assert cosine_pearson(before, after) == pytest.approx(expected, rel=1e-12)
    flipped = cosine_pearson(before, torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]]).double())
    assert flipped == pytest.approx(numpy.corrcoef([half, 0, half], [half, 0, -half])[0, 1])


def test_pearson_takes_each_pair_once_and_no_token_with_itself() -> None:
    before, after = normal(20, 6), normal(20, 3, seed=9)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    cosines = [
        [float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i, j in pairs]
        for rows in (before, after)
    ]
    expected = numpy.corrcoef(*cosines)[0, 1]
    assert cosine_pearson(before, after) == pytest.approx(expected, rel=1e-10)


def test_pearson_that_is_not_defined_is_none() -> None:
    rows = normal(5, 4)
    assert cosine_pearson(rows[:2], rows[:2]) is None  # one pair
    assert cosine_pearson(rows[:1].expand(5, 4) * 3, rows) is None  # all cosines are 1
    assert cosine_pearson(torch.zeros(5, 4).double(), rows) is None
    # Tokens that are nothing after projection have no angle; the others do.
    some = rows.clone()
    some[1] = 0
    assert cosine_pearson(rows, some) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("n", [0, 1, 5, MOST_SAMPLED, MOST_SAMPLED + 1, 100_000])
def test_sampled_tokens_are_spread_and_the_same_every_time(n: int) -> None:
    indices = sampled(n)
    assert len(indices) == min(n, MOST_SAMPLED)
    assert torch.equal(indices, sampled(n)) and torch.equal(indices, indices.unique())
    if n:
        assert indices[0] == 0 and n - n // len(indices) - 2 < indices[-1] < n


def test_angles_of_known_subspaces() -> None:
    axes = torch.eye(6)
    theta = math.radians(30)
    turned = axes[:, :2].clone()
    turned[0, 0], turned[2, 0] = math.cos(theta), math.sin(theta)
    found = angles_between({4: 3 * turned, 0: axes[:, :2], 2: axes[:, 3:], 1: axes[:, [1, 0]]})
    angles = {each.boundaries: each for each in found}
    assert list(angles) == [(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)]
    assert angles[0, 1].mean_degrees == pytest.approx(0, abs=1e-4)
    assert angles[0, 2].smallest_degrees == pytest.approx(90)
    assert angles[0, 4].mean_degrees == pytest.approx(15, abs=1e-4)
    assert angles[0, 4].smallest_degrees == pytest.approx(0, abs=1e-4)
    assert angles_between({3: axes}) == []


@pytest.mark.parametrize("kind", ["none", "factorized", "static", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure_agrees_with_the_boundary(kind: str, dtype: torch.dtype) -> None:
    d, r = 24, 6
    anchor = build_anchor(
        kind, vocab_size=11, hidden_size=d, anchor_rank=5, generator=seeded(1)
    ).to(dtype)
    for parameter in anchor.parameters():
        torch.nn.init.normal_(parameter, generator=seeded(2))
    ids = torch.randint(11, (16, 2), generator=seeded(3))
    x = normal(16, 2, d).to(dtype)
    projector = FixedProjector(d, r, seeded(4))
    figures = measure(x, anchor.coordinates(ids), anchor.basis, projector.A)
    kept = energy_kept(x, anchor.coordinates(ids), anchor.basis, projector)
    assert figures.energy_kept == pytest.approx(kept.item(), rel=1e-5)
    assert figures.tokens == 32 and figures.energy_random == 0.25
    assert figures.energy_kept is not None and figures.energy_ceiling is not None
    assert 0 < figures.energy_kept < figures.energy_ceiling < 1
    residual = x.double().reshape(32, d)
    if kind != "none":
        c = anchor(ids).gathered().reshape(32, -1).detach().double()
        residual = residual - (c if anchor.basis is None else c @ anchor.basis.double())
    found = anchored_residual(x, anchor.coordinates(ids), anchor.basis)
    torch.testing.assert_close(found.double(), residual, rtol=1e-5, atol=1e-5)
    expected = cosine_pearson(residual, residual @ projector.A.double())
    assert figures.cosine_pearson == pytest.approx(expected, rel=1e-5)
    assert figures.rank_99 == rank_for_energy(spectrum(residual.mT @ residual), 0.99)


def test_measure_of_a_square_projector() -> None:
    figures = measure(normal(9, 2, 8), None, None, orthonormal(8, 8))
    for figure in (figures.energy_kept, figures.energy_ceiling, figures.cosine_pearson):
        assert figure == pytest.approx(1.0, rel=1e-12)
    assert figures.energy_random == 1.0


def test_measure_of_nothing_and_of_overflow() -> None:
    a = orthonormal(8, 2)
    nothing = measure(torch.zeros(5, 1, 8), None, None, a)
    assert (nothing.energy_kept, nothing.energy_ceiling, nothing.rank_99) == (1.0, 1.0, 0)
    assert nothing.cosine_pearson is None
    x = normal(5, 1, 8)
    for value in (math.nan, math.inf):
        x[0, 0, 0] = value
        assert measure(x, None, None, a) == Geometry(
            rank=2, tokens=5, energy_kept=None, energy_ceiling=None, energy_random=0.25,
            rank_99=None, cosine_pearson=None,
        )  # fmt: skip


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(7, 2\) does not fit activations 8 wide"):
        measure(normal(5, 8), None, None, normal(7, 2))
    with pytest.raises(ValueError, match=r"5 tokens must be 3 wide, got shape \(4, 3\)"):
        measure(normal(5, 8), Coordinates.of(normal(4, 3)), normal(3, 8), normal(8, 2))


def test_mean_over_replicas() -> None:
    one = Geometry(rank=4, tokens=64, energy_kept=0.2, energy_ceiling=0.5, energy_random=0.25,
                   rank_99=9, cosine_pearson=0.9)  # fmt: skip
    other = Geometry(rank=4, tokens=64, energy_kept=0.4, energy_ceiling=0.7, energy_random=0.25,
                     rank_99=12, cosine_pearson=None)  # fmt: skip
    both = mean([one, other])
    assert both.energy_kept == pytest.approx(0.3) and both.energy_ceiling == pytest.approx(0.6)
    assert (both.tokens, both.rank_99, both.cosine_pearson) == (64, 10.5, None)
    assert mean([one]) == one
