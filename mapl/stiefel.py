# SPDX-License-Identifier: Apache-2.0
"""The Stiefel manifold St(d, r) = {A ∈ R^{d×r} : AᵀA = I_r}: sample, tangent, retract, check."""

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from torch import Tensor

from mapl.fp32 import full_precision

# |AᵀA − I|∞ that a retraction in fp32 keeps well below, at every size that was measured.
TOLERANCE = 1e-5


def msign(x: Tensor, steps: int = 8) -> Tensor:
    """Matrix sign: the polar factor UVᵀ of X = USVᵀ, by PolarExpress (arXiv 2505.16932).

    Eight steps bring singular values above about 1e-3 of the Frobenius norm to 1 within fp32
    rounding. Smaller ones are lifted, by a factor of at most some 6e3, and zero stays zero.

    Args:
        x: [m, n] fp32. The scale does not matter, from subnormal to the largest finite number.
        steps: PolarExpress iterations, at least 1.

    Returns:
        [m, n] fp32, contiguous. NaN throughout if ``x`` is not finite.

    Raises:
        ValueError: ``x`` is not an fp32 matrix, or ``steps`` is below 1.
    """
    if x.ndim != 2 or x.dtype != torch.float32:
        raise ValueError(
            f"msign takes an fp32 matrix, got {x.dtype} of shape {tuple(x.shape)}; "
            "convert it with .float() first"
        )
    if steps < 1:
        raise ValueError(f"msign needs at least one step, got steps={steps}; 8 is exact in fp32")
    # The iteration divides by the Frobenius norm, whose squares over- or underflow in fp32.
    largest = x.abs().amax()
    scaled = x / torch.where(largest > 0, largest, 1.0)
    with full_precision(x.device):
        sign: Tensor = newton_schulz(scaled, steps, coefficient_type="polar_express")
    return sign.contiguous()


def random_stiefel(d: int, r: int, generator: torch.Generator) -> Tensor:
    """A uniformly distributed point of St(d, r): Q of QR of a normal matrix, diag(R) > 0.

    Args:
        d: rows.
        r: columns, at most ``d``.
        generator: a private CPU generator. Equal seeds give equal matrices; the global generator
            is neither read nor advanced.

    Returns:
        [d, r] fp32 on the CPU, formed in fp64.

    Raises:
        ValueError: not 1 ≤ r ≤ d, or the generator is not on the CPU.
    """
    if not 1 <= r <= d:
        raise ValueError(f"orthonormal columns need 1 <= rank <= {d}, got rank {r}")
    if generator.device.type != "cpu":
        raise ValueError(
            f"random_stiefel needs a CPU generator, got one on {generator.device}; "
            "stages on different devices must draw the same numbers"
        )
    # Drawn column by column: a smaller rank from the same seed spans a part of a larger one.
    normal = torch.randn(r, d, generator=generator, dtype=torch.float64, device="cpu").mT
    q: Tensor
    q, upper = torch.linalg.qr(normal)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return (q * sign).float().contiguous()


def tangent(a: Tensor, g: Tensor) -> Tensor:
    """Project an ambient gradient onto the tangent space at A: G − A sym(AᵀG).

    Args:
        a: [d, r], orthonormal columns.
        g: [d, r], same dtype.

    Returns:
        [d, r].
    """
    with full_precision(a.device):
        inner = a.mT @ g
        # Halves are taken before the sum, which could otherwise overflow for huge gradients.
        return g.sub(a @ (0.5 * inner + 0.5 * inner.mT))


def retract(a: Tensor) -> Tensor:
    """The nearest point of St(d, r): msign(A), then one cubic Newton–Schulz step A(3I − AᵀA)/2.

    PolarExpress alone reaches |AᵀA − I|∞ < 1e-6 from A − αD with α ≤ 0.5, up to 4096×256 and for
    square A; the last step costs two GEMMs of 26 and squares the error left by harder inputs.

    Args:
        a: [d, r] fp32 of full rank, d ≥ r.

    Returns:
        [d, r] fp32.

    Raises:
        ValueError: ``a`` is not an fp32 matrix with d ≥ r.
    """
    if a.ndim == 2 and a.size(0) < a.size(1):
        raise ValueError(f"A of shape {tuple(a.shape)} has more columns than rows; transpose it")
    sign = msign(a)
    with full_precision(a.device):
        return 1.5 * sign - 0.5 * (sign @ (sign.mT @ sign))


def nearest_basis(v: Tensor, a: Tensor) -> Tensor:
    """Of all orthonormal bases of span V the one nearest to A in the Frobenius norm.

        V·polar(VᵀA) = V U Wᵀ,    VᵀA = U S Wᵀ

    The orthogonal Procrustes problem: P. H. Schönemann, Psychometrika 31, 1966. Which basis of its
    span V is does not matter. Where VᵀA is singular there are several; this is one of them.

    By an SVD, since `msign` leaves the smallest singular values of an ill-conditioned VᵀA below 1.

    Args:
        v: V [d, r] fp64, orthonormal columns.
        a: A [d, r], orthonormal or not.

    Returns:
        [d, r] fp64.
    """
    left, _, right = torch.linalg.svd(v.mT @ a.double())
    nearest: Tensor = v @ (left @ right)
    return nearest


def orthonormality_error(a: Tensor) -> Tensor:
    """max |AᵀA − I|, entry by entry, as a 0-dim tensor on A's device.

    Args:
        a: [d, r].
    """
    with full_precision(a.device):
        gram = a.mT @ a
    return (gram - torch.eye(a.size(1), dtype=a.dtype, device=a.device)).abs().amax()


def check(a: Tensor, tolerance: float = TOLERANCE, name: str = "A") -> None:
    """Raise unless A lies on the manifold. Waits for the device.

    Args:
        a: [d, r].
        tolerance: largest |AᵀA − I|∞ allowed.
        name: what to call the matrix in the error.

    Raises:
        RuntimeError: A is off the manifold or not finite.
    """
    error = orthonormality_error(a).item()
    if not error <= tolerance:
        raise RuntimeError(
            f"{name} is off the Stiefel manifold: max|AᵀA − I| = {error:.3e} exceeds "
            f"{tolerance:.1e}. It was changed by something other than its own step, cast to a "
            "narrower dtype, or damaged on disk; restore it from a sound checkpoint or pass it "
            "through mapl.stiefel.retract"
        )
