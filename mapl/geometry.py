# SPDX-License-Identifier: Apache-2.0
"""What a projector keeps of the activations at a boundary, after arXiv 2606.05484.

    R = X − C P        M = RᵀR        λ₁ ≥ … ≥ λ_d eigenvalues of M        Q = orth(A)

R [n, d] anchored residual, one row a token; A [d, r] projector; X, C, P as in `mapl.boundary`.
The paper shows energy kept, principal angles between boundaries and how well pairwise cosines
survive. To judge the first, the energy that the best subspace of rank r and a random one keep
stands beside it.

M is summed and taken apart in fp64: squares halve the digits, and the last percent of the energy,
which `rank_for_energy` looks for, is spread over many small eigenvalues. M is not centred, since
neither is what crosses a boundary: a mean that all tokens share counts as one direction of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mapl.boundary import principal_angles
from mapl.coordinates import Coordinates
from mapl.fp32 import accumulation_dtype, full_precision

#: Tokens whose pairwise cosines are compared: 130,816 pairs.
MOST_SAMPLED = 512

#: Rows that `second_moment` holds in fp64 at a time.
_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Figures of one micro-batch at one boundary; those that are not defined are None.

    Attributes:
        rank: r.
        tokens: n, tokens that they are taken from.
        energy_kept: see `subspace_energy`, in [0, 1].
        energy_ceiling: see `best_energy`, in [0, 1]. Over fewer tokens than about d it is high:
            the best subspace of these tokens fits their noise too.
        energy_random: r/d, what a random subspace keeps on average.
        rank_99: see `rank_for_energy`, dimensions.
        cosine_pearson: see `cosine_pearson`, in [−1, 1].
    """

    rank: int
    tokens: int
    energy_kept: float | None
    energy_ceiling: float | None
    energy_random: float
    rank_99: float | None
    cosine_pearson: float | None


@dataclass(frozen=True)
class Angles:
    """Principal angles between the projectors of two boundaries, in degrees."""

    boundaries: tuple[int, int]
    mean_degrees: float
    smallest_degrees: float


@torch.no_grad()
def measure(
    x: Tensor, coordinates: Coordinates | None, basis: Tensor | None, a: Tensor
) -> Geometry:
    """All figures of one micro-batch, before a codec and in higher precision than the model's.

    Waits for the device. It takes n·d numbers of fp32 and a few d·d of fp64 beside x, and the
    time of a d×d eigenvalue problem.

    Args:
        x: X [..., d], the sending stage's output.
        coordinates: C [..., k], or None for no anchor.
        basis: P [k, d], or None for the identity.
        a: A [d, r], of full rank; orthonormal or not.

    Returns:
        The figures; those of an x that is not finite are None.

    Raises:
        ValueError: shapes that do not fit.
    """
    residual = anchored_residual(x, coordinates, basis)
    (n, d), r = residual.shape, a.size(1)
    if a.size(0) != d:
        raise ValueError(f"a projector of shape {tuple(a.shape)} does not fit activations {d} wide")
    moment = second_moment(residual)
    if not moment.isfinite().all():
        return Geometry(
            rank=r, tokens=n, energy_kept=None, energy_ceiling=None, energy_random=r / d,
            rank_99=None, cosine_pearson=None,
        )  # fmt: skip
    eigenvalues = spectrum(moment)
    sample = residual[sampled(n).to(residual.device)].double()
    return Geometry(
        rank=r,
        tokens=n,
        energy_kept=subspace_energy(moment, a),
        energy_ceiling=best_energy(eigenvalues, r),
        energy_random=r / d,
        rank_99=rank_for_energy(eigenvalues, 0.99),
        cosine_pearson=cosine_pearson(sample, sample @ a.double()),
    )


def anchored_residual(x: Tensor, coordinates: Coordinates | None, basis: Tensor | None) -> Tensor:
    """R = X − C P as a matrix, in fp32 (fp64 for fp64 inputs).

    Args:
        x: X [..., d].
        coordinates: C [..., k], or None for no anchor.
        basis: P [k, d], or None for the identity, k = d.

    Returns:
        [n, d].

    Raises:
        ValueError: coordinates of other tokens or another width.
    """
    wide = accumulation_dtype(x.dtype)
    rows = x.reshape(-1, x.size(-1)).to(wide)
    if coordinates is None:
        return rows
    c = coordinates.rows().to(wide)
    width = rows.size(1) if basis is None else basis.size(0)
    if c.shape != (rows.size(0), width):
        raise ValueError(
            f"anchor coordinates for {rows.size(0)} tokens must be {width} wide, got shape "
            f"{tuple(c.shape)}"
        )
    if basis is None:
        return rows - c
    with full_precision(x.device):
        return torch.addmm(rows, c, basis.to(wide), alpha=-1)


def second_moment(residual: Tensor) -> Tensor:
    """M = RᵀR, summed in fp64.

    Args:
        residual: R [n, d].

    Returns:
        [d, d] fp64.
    """
    d = residual.size(1)
    moment = residual.new_zeros(d, d, dtype=torch.float64)
    add_second_moment(moment, residual)
    return moment


def add_second_moment(total: Tensor, residual: Tensor) -> None:
    """M ← M + RᵀR in place.

    Args:
        total: M [d, d] fp64.
        residual: R [n, d].
    """
    for rows in residual.split(_ROWS):
        wide = rows.double()
        total.addmm_(wide.mT, wide)


def spectrum(moment: Tensor) -> Tensor:
    """Eigenvalues of M, the energy along each principal direction.

    Args:
        moment: [d, d] fp64, symmetric and finite.

    Returns:
        [d] fp64, descending; what rounding makes negative is 0.
    """
    ascending: Tensor = torch.linalg.eigvalsh(moment)
    return ascending.flip(0).clamp(min=0.0)


def leading_directions(moment: Tensor, r: int) -> Tensor:
    """V: the eigenvectors of the r largest eigenvalues of M, which keep the most of the energy.

    Each is one up to its sign, and in a cluster of equal eigenvalues up to a rotation.

    Args:
        moment: [d, d] fp64, symmetric and finite.
        r: how many, 1 ≤ r ≤ d.

    Returns:
        [d, r] fp64, orthonormal columns, the largest eigenvalue's first.
    """
    ascending: Tensor = torch.linalg.eigh(moment).eigenvectors
    return ascending[:, -r:].flip(1)


def best_energy(eigenvalues: Tensor, r: int) -> float:
    """(λ₁ + … + λ_r) / (λ₁ + … + λ_d), the part that the best subspace of rank r would keep.

    Args:
        eigenvalues: [d], descending.
        r: its rank.

    Returns:
        In [0, 1]; 1 if there is nothing to keep.
    """
    return _part(eigenvalues[:r].sum(), eigenvalues.sum())


def rank_for_energy(eigenvalues: Tensor, part: float) -> int:
    """The least k with λ₁ + … + λ_k ≥ part · (λ₁ + … + λ_d).

    Args:
        eigenvalues: [d], descending.
        part: of the energy, in (0, 1).

    Returns:
        Dimensions; 0 if there is no energy.
    """
    sums = eigenvalues.cumsum(0)
    if sums[-1] <= 0:
        return 0
    return int((sums < part * sums[-1]).sum()) + 1


def subspace_energy(moment: Tensor, a: Tensor) -> float:
    """‖R Q‖² / ‖R‖² = tr(QᵀMQ) / tr M, Q an orthonormal basis of A's columns.

    For orthonormal A it is ‖Z‖²/‖R‖², as `mapl.boundary.energy_kept` has it. For another A it is
    still the part that lies in A's column space, which no scale of A changes.

    Args:
        moment: M [d, d] fp64.
        a: A [d, r] of full rank.

    Returns:
        In [0, 1]; 1 if there is nothing to keep.
    """
    q = orthonormal_basis(a)
    return _part((q * (moment @ q)).sum(), moment.trace())


def orthonormal_basis(a: Tensor) -> Tensor:
    """Q [d, r] fp64 of the column space of A [d, r], itself orthonormal to fp32 at best."""
    q: Tensor = torch.linalg.qr(a.detach().double()).Q
    return q


def sampled(n: int, most: int = MOST_SAMPLED) -> Tensor:
    """Indices of at most `most` of n tokens, evenly spaced and the same every time.

    Returns:
        [min(n, most)] int64, ascending.
    """
    count = min(n, most)
    return torch.arange(count) * n // max(count, 1)


def cosine_pearson(before: Tensor, after: Tensor) -> float | None:
    """Pearson's correlation between pairwise cosine similarities before and after projection.

        ρ( {cos(Rᵢ, Rⱼ)}, {cos(Zᵢ, Zⱼ)} ),  i < j

    arXiv 2606.05484 reports 0.992 for "pairwise cosine similarity of tokens". Whether it compares Z
    with X or with X − anchor, and over which tokens, is not known; here it is X − anchor, the very
    thing that is projected. Every pair counts once, and no token with itself.

    Args:
        before: R [m, d] fp64.
        after: Z [m, r] fp64, the same tokens.

    Returns:
        In [−1, 1]; None where it is not defined: fewer than two pairs of tokens that are not 0, or
        cosines that are all the same.
    """
    norms = before.norm(dim=1), after.norm(dim=1)
    there = (norms[0] > 0) & (norms[1] > 0)
    first, second = (
        _centred(_pairs(rows[there] / norm[there, None]))
        for rows, norm in zip((before, after), norms, strict=True)
    )
    if first is None or second is None:
        return None
    return float((first @ second).clamp(-1.0, 1.0))


def angles_between(projectors: Mapping[int, Tensor]) -> list[Angles]:
    """Principal angles between the projectors of each pair of boundaries.

    Args:
        projectors: boundary → A [d, r], of full rank; ranks may differ.

    Returns:
        For each pair p < q the mean and the smallest of the min(r_p, r_q) angles.
    """
    bases = {boundary: orthonormal_basis(projectors[boundary]) for boundary in sorted(projectors)}
    found = []
    for pair in combinations(bases, 2):
        angles = principal_angles(bases[pair[0]], bases[pair[1]])
        found.append(Angles(pair, float(angles.mean()), float(angles.min())))
    return found


def mean(of: Sequence[Geometry]) -> Geometry:
    """The mean over replicas, figure by figure; None where one of them has none."""

    def average(name: str) -> float | None:
        values = [getattr(each, name) for each in of]
        return None if None in values else sum(values) / len(values)

    return Geometry(
        rank=of[0].rank,
        tokens=round(sum(each.tokens for each in of) / len(of)),
        energy_kept=average("energy_kept"),
        energy_ceiling=average("energy_ceiling"),
        energy_random=of[0].energy_random,
        rank_99=average("rank_99"),
        cosine_pearson=average("cosine_pearson"),
    )


def _pairs(unit: Tensor) -> Tensor:
    """Cosines of all pairs i < j of unit rows [m, n], as a vector."""
    cosines = unit @ unit.mT
    i, j = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return cosines[i, j]


def _centred(values: Tensor) -> Tensor | None:
    """Less their mean and scaled to norm 1; None if they differ by no more than rounding."""
    if values.numel() < 2:
        return None
    centred = values - values.mean()
    norm = centred.norm()
    # Cosines lie in [-1, 1] and are rounded at 1e-16.
    return centred / norm if norm > 1e-12 * values.numel() ** 0.5 else None


def _part(kept: Tensor, total: Tensor) -> float:
    return float(kept / total) if total > 0 else 1.0
