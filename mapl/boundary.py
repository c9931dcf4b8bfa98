# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of a boundary (arXiv 2606.05484), with hand-written backwards.

    Z = (X − C P) A = X·A − C·(P A)              X̂ = Z Aᵀ + C P = [Z | C]·[Aᵀ ; P]

X [s, b, d] activation, Z [s, b, r] latent, C [s, b, k] anchor coordinates (or None), P [k, d] basis
with orthonormal rows (or None for the identity, k = d), A [d, r]. With a basis, no d-wide anchor
is ever written to memory. GEMMs run in the dtype of X; dA is accumulated in fp32. In an fp32 model
GEMMs over tokens heed torch's float32 matmul precision; those of weights alone are always exact.

C is the sender's own in ``encode`` and the receiver's own in ``decode``. Gradients reach the table
behind it through autograd; dA goes to ``projector.accumulate`` instead, because it is summed over
two stages before anyone may use it. If neither input requires a gradient there is no backward, and
so no dA: a received latent must be a leaf with ``requires_grad``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mapl.fp32 import accumulation_dtype, full_precision, mm_wide
from mapl.projectors import Projector


def encode(
    x: Tensor, coordinates: Tensor | None, basis: Tensor | None, projector: Projector
) -> Tensor:
    """Z = X·A − C·(P A), on the sending stage.

    Backward: dX = dZ Aᵀ;  dA += Xᵀ dZ − Pᵀ(Cᵀ dZ);  dC = −dZ (P A)ᵀ.

    Args:
        x: [s, b, d] in the model's dtype; kept for the backward if the projector learns.
        coordinates: C [s, b, k], or None for no anchor.
        basis: P [k, d], or None for the identity.
        projector: holds A [d, r] and takes dA.

    Returns:
        Z [s, b, r] in x's dtype: contiguous, no view, and not kept for the backward, so that its
        storage may be freed once it has been sent.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("encode's x", x, 0, coordinates, basis, projector)
    if coordinates is not None:
        coordinates = coordinates.to(x.dtype)
    z: Tensor = _Encode.apply(x, coordinates, basis, projector.A, projector)
    return z


def decode(
    z: Tensor, coordinates: Tensor | None, basis: Tensor | None, projector: Projector
) -> Tensor:
    """X̂ = [Z | C]·[Aᵀ ; P], on the receiving stage.

    Backward: dZ = dX̂ A;  dA += dX̂ᵀ Z;  dC = dX̂ Pᵀ.

    Args:
        z: [s, b, r] in the model's dtype; kept for the backward if the projector learns.
        coordinates: C [s, b, k], or None for no anchor. Never written to.
        basis: P [k, d], or None for the identity.
        projector: holds A [d, r] and takes dA.

    Returns:
        X̂ [s, b, d] in z's dtype, contiguous.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("decode's z", z, 1, coordinates, basis, projector)
    if coordinates is not None:
        coordinates = coordinates.to(z.dtype)
    x: Tensor = _Decode.apply(z, coordinates, basis, projector.A, projector)
    return x


@torch.no_grad()
def energy_kept(
    x: Tensor, coordinates: Tensor | None, basis: Tensor | None, projector: Projector
) -> Tensor:
    """‖Z‖² / ‖X − CP‖², the part of the anchored activation that the latent keeps.

    With a basis of orthonormal rows, ‖X − CP‖² = ‖X‖² − 2⟨XPᵀ, C⟩ + ‖C‖² needs no d-wide anchor.

    Args:
        x: [s, b, d].
        coordinates: C [s, b, k] or None.
        basis: P [k, d] or None.
        projector: holds A [d, r].

    Returns:
        0-dim fp32 in [0, 1] for orthonormal A, up to rounding; 1 if there is nothing to keep.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("energy_kept's x", x, 0, coordinates, basis, projector)
    wide = accumulation_dtype(x.dtype)
    rows, a = _rows(x).to(wide), projector.A.to(wide)
    with full_precision(x.device):
        if coordinates is None:
            total, z = torch.linalg.vector_norm(rows).square(), rows @ a
        elif basis is None:
            residual = rows - _rows(coordinates).to(wide)
            total, z = torch.linalg.vector_norm(residual).square(), residual @ a
        else:
            c, p = _rows(coordinates).to(wide), basis.to(wide)
            squared_norm = torch.linalg.vector_norm(rows).square()
            total = squared_norm - 2 * (rows @ p.mT * c).sum() + c.square().sum()
            z = torch.addmm(rows @ a, c, p @ a, alpha=-1)
    return torch.where(total > 0, z.square().sum() / total, 1.0)


@torch.no_grad()
def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the column spaces of two orthonormal matrices: arccos of svdvals(AᵀB).

    Args:
        a: [d, r_a], orthonormal columns.
        b: [d, r_b], orthonormal columns.

    Returns:
        [min(r_a, r_b)] fp32 degrees, ascending. fp32 inputs resolve angles down to about 0.03°.

    Raises:
        ValueError: different numbers of rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.size(0) != b.size(0):
        raise ValueError(
            "principal angles need two matrices with equally many rows, got shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    cosines = torch.linalg.svdvals(a.double().mT @ b.double()).clamp(0.0, 1.0)
    return torch.rad2deg(torch.acos(cosines)).float()


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coordinates: Tensor | None,
        basis: Tensor | None,
        a: Tensor,
        projector: Projector,
    ) -> Tensor:
        z = x.new_empty(*x.shape[:-1], a.size(1))
        z_rows = z.view(-1, a.size(1))
        torch.mm(_rows(x), a.to(x.dtype), out=z_rows)
        if coordinates is not None:
            z_rows.addmm_(_rows(coordinates), _basis_times_a(basis, a, x.dtype), alpha=-1)
        kept = (x, coordinates) if projector.learns else (None, None)
        ctx.save_for_backward(*kept, basis, a)
        ctx.projector = projector
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, coordinates, basis, a = ctx.saved_tensors
        needs_dx, needs_dc, *_ = ctx.needs_input_grad
        dz_rows = _rows(dz)
        if ctx.projector.learns:
            da = mm_wide(_rows(x).mT, dz_rows)
            if coordinates is not None:
                anchored = mm_wide(_rows(coordinates).mT, dz_rows)
                if basis is not None:
                    with full_precision(dz.device):
                        anchored = basis.to(anchored.dtype).mT @ anchored
                da.sub_(anchored)
            ctx.projector.accumulate(da)
        dx = dz @ a.to(dz.dtype).mT if needs_dx else None
        dc = -(dz @ _basis_times_a(basis, a, dz.dtype).mT) if needs_dc else None
        return dx, dc, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        coordinates: Tensor | None,
        basis: Tensor | None,
        a: Tensor,
        projector: Projector,
    ) -> Tensor:
        x = z.new_empty(*z.shape[:-1], a.size(0))
        x_rows, z_rows, up = x.view(-1, a.size(0)), _rows(z), a.to(z.dtype).mT
        if coordinates is None:
            torch.mm(z_rows, up, out=x_rows)
        elif basis is None:
            torch.addmm(_rows(coordinates), z_rows, up, out=x_rows)
        else:
            latent = torch.cat([z_rows, _rows(coordinates)], dim=1)
            torch.mm(latent, torch.cat([up, basis.to(z.dtype)]), out=x_rows)
        ctx.save_for_backward(z if projector.learns else None, basis, a)
        ctx.projector = projector
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        z, basis, a = ctx.saved_tensors
        needs_dz, needs_dc, *_ = ctx.needs_input_grad
        if ctx.projector.learns:
            ctx.projector.accumulate(mm_wide(_rows(dx).mT, _rows(z)))
        dz = dx @ a.to(dx.dtype) if needs_dz else None
        dc = None
        if needs_dc:
            dc = dx if basis is None else dx @ basis.to(dx.dtype).mT
        return dz, dc, None, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., n] as the matrix [tokens, n]."""
    return x.reshape(-1, x.size(-1))


def _basis_times_a(basis: Tensor | None, a: Tensor, dtype: torch.dtype) -> Tensor:
    """P A [k, r], formed in fp32 before it is rounded to the model's dtype."""
    if basis is None:
        return a.to(dtype)
    with full_precision(a.device):
        return (basis.to(a.dtype) @ a).to(dtype)


def _check_shapes(
    name: str,
    tensor: Tensor,
    side: int,
    coordinates: Tensor | None,
    basis: Tensor | None,
    projector: Projector,
) -> None:
    d, width = projector.A.size(0), projector.A.size(side)
    if tensor.ndim < 2 or tensor.size(-1) != width:
        raise ValueError(
            f"{name} must be [..., {width}] for a projector of shape {tuple(projector.A.shape)}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if basis is not None and (basis.ndim != 2 or basis.size(1) != d):
        raise ValueError(f"anchor basis must be [k, {d}], got shape {tuple(basis.shape)}")
    if coordinates is None:
        if basis is not None:
            raise ValueError("an anchor basis needs coordinates: pass both, or neither")
        return
    expected = (*tensor.shape[:-1], d if basis is None else basis.size(0))
    if coordinates.shape != expected:
        raise ValueError(
            f"anchor coordinates for {name} of shape {tuple(tensor.shape)} must have shape "
            f"{expected}, got {tuple(coordinates.shape)}; were the ids those of this micro-batch?"
        )
