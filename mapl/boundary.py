# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of a boundary (arXiv 2606.05484), with hand-written backwards.

    Z = (X − C P) A = [X | C]·[A ; −P A]              X̂ = Z Aᵀ + C P = [Z | C]·[Aᵀ ; P]

X [s, b, d] activation, Z [s, b, r] latent, C [s, b, k] anchor coordinates (or None), P [k, d] basis
with orthonormal rows (or None for the identity, k = d), A [d, r]. With a basis, no d-wide anchor
is ever written to memory. GEMMs run in the dtype of X; dA is accumulated in fp32. In an fp32 model
GEMMs over tokens heed torch's float32 matmul precision; those of weights alone are always exact.

C is the sender's own in ``encode`` and the receiver's own in ``decode``. Gradients reach the table
behind it through autograd (see `mapl.coordinates`); dA goes to the projector's accumulator instead,
because it is summed over two stages before anyone may use it. If neither input requires a gradient
there is no backward, and so no dA: a received latent must be a leaf with ``requires_grad``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mapl.coordinates import Coordinates
from mapl.fp32 import accumulation_dtype, full_precision
from mapl.ops.gathered import gathered_mm
from mapl.ops.gathered_operands import GatheredOperands
from mapl.projectors import Projector

#: Operands → [left | table[ids]]·weight; see `mapl.ops.gathered.gathered_mm`.
Product = Callable[[GatheredOperands], Tensor]


def encode(
    x: Tensor,
    coordinates: Coordinates | None,
    basis: Tensor | None,
    projector: Projector,
    product: Product = gathered_mm,
) -> Tensor:
    """Z = X·A − C·(P A), on the sending stage.

    Backward: dX = dZ Aᵀ;  dA += Xᵀ dZ − Pᵀ(Cᵀ dZ);  dC = −dZ (P A)ᵀ.

    Args:
        x: [s, b, d] in the model's dtype; kept for the backward if the projector learns.
        coordinates: C [s, b, k], or None for no anchor; gathered while it is multiplied.
        basis: P [k, d], or None for the identity.
        projector: holds A [d, r] and takes dA.
        product: forms Z where there is a basis; a codec's own may make bytes of it there and then
            (`Codec.product_into`).

    Returns:
        Z [s, b, r] in x's dtype: contiguous, no view, and not kept for the backward, so that its
        storage may be freed once it has been sent.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("encode's x", x, 0, coordinates, basis, projector)
    table, use = _table_and_use(coordinates, x.dtype)
    z: Tensor = _Encode.apply(x, table, coordinates, use, basis, projector.A, projector, product)
    return z


def decode(
    z: Tensor,
    coordinates: Coordinates | None,
    basis: Tensor | None,
    projector: Projector,
    product: Product = gathered_mm,
) -> Tensor:
    """X̂ = [Z | C]·[Aᵀ ; P], on the receiving stage.

    Backward: dZ = dX̂ A;  dA += dX̂ᵀ Z;  dC = dX̂ Pᵀ.

    Args:
        z: [s, b, r] in the model's dtype; kept for the backward if the projector learns.
        coordinates: C [s, b, k], or None for no anchor. Never written to.
        basis: P [k, d], or None for the identity.
        projector: holds A [d, r] and takes dA.
        product: forms X̂ where there is a basis; a codec's own may fill z out of bytes first
            (`Codec.product_from`).

    Returns:
        X̂ [s, b, d] in z's dtype, contiguous.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("decode's z", z, 1, coordinates, basis, projector)
    assert product is gathered_mm or z.is_contiguous(), "a codec fills z in place"
    table, use = _table_and_use(coordinates, z.dtype)
    x: Tensor = _Decode.apply(z, table, coordinates, use, basis, projector.A, projector, product)
    return x


@torch.no_grad()
def energy_kept(
    x: Tensor, coordinates: Coordinates | None, basis: Tensor | None, projector: Projector
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
            residual = rows - coordinates.rows().to(wide)
            total, z = torch.linalg.vector_norm(residual).square(), residual @ a
        else:
            c, p = coordinates.rows().to(wide), basis.to(wide)
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


#: How `Coordinates.table_gradient` is to be called.
Use = dict[str, bool]


def _table_and_use(
    coordinates: Coordinates | None, dtype: torch.dtype
) -> tuple[Tensor | None, Use]:
    """The table in the model's dtype, and what becomes of its gradient."""
    if coordinates is None:
        return None, {}
    table = coordinates.table.to(dtype)
    adds = coordinates.adds_to_main_grad and table is coordinates.table
    return table, {"adds": adds, "last": coordinates.begin_use(adds=adds)}


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor | None,
        coordinates: Coordinates | None,
        use: Use,
        basis: Tensor | None,
        a: Tensor,
        projector: Projector,
        product: Product,
    ) -> Tensor:
        weight = projector.operands.get("encode", a, basis, x.dtype)
        rows = _rows(x)
        if table is None or coordinates is None:
            z = torch.mm(rows, weight)
        elif basis is None:
            z = torch.mm(rows, weight).addmm_(coordinates.rows(table), weight, alpha=-1)
        else:
            z = product(GatheredOperands(rows, table, coordinates.ids, weight))
        ctx.save_for_backward(x if projector.learns else None, table, basis, a)
        ctx.coordinates, ctx.use, ctx.projector, ctx.weight = coordinates, use, projector, weight
        return _reshaped(z, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, table, basis, a = ctx.saved_tensors
        needs_dx, needs_table, *_ = ctx.needs_input_grad
        coordinates, d = ctx.coordinates, a.size(0)
        dz_rows, down = _rows(dz), ctx.weight[: a.size(0)]
        if ctx.projector.learns:
            ctx.projector.accumulate_product(_rows(x), dz_rows)
            if coordinates is not None:
                c = coordinates.rows(table)
                ctx.projector.accumulate_product(c, dz_rows, basis, alpha=-1)
        dx = dz @ down.mT if needs_dx else None
        dtable = None
        if needs_table:
            dc = -(dz_rows @ down.mT) if basis is None else dz_rows @ ctx.weight[d:].mT
            dtable = coordinates.table_gradient(table, dc, **ctx.use)
        return dx, dtable, *[None] * 6


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        table: Tensor | None,
        coordinates: Coordinates | None,
        use: Use,
        basis: Tensor | None,
        a: Tensor,
        projector: Projector,
        product: Product,
    ) -> Tensor:
        weight = projector.operands.get("decode", a, basis, z.dtype)
        rows = _rows(z)
        if table is None or coordinates is None:
            x = torch.mm(rows, weight)
        elif basis is None:
            x = torch.addmm(coordinates.rows(table), rows, weight)
        else:
            x = product(GatheredOperands(rows, table, coordinates.ids, weight))
        ctx.save_for_backward(z if projector.learns else None, table, basis, a)
        ctx.coordinates, ctx.use, ctx.projector, ctx.weight = coordinates, use, projector, weight
        return _reshaped(x, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        z, table, basis, a = ctx.saved_tensors
        needs_dz, needs_table, *_ = ctx.needs_input_grad
        dx_rows, r = _rows(dx), a.size(1)
        if ctx.projector.learns:
            ctx.projector.accumulate_product(dx_rows, _rows(z))
        dc, dtable = dx_rows, None
        if basis is not None and needs_table:
            both = dx_rows @ ctx.weight.mT  # one pass over dX̂ gives [dZ | dC]
            # Left as a view, dZ would be copied by autograd: a leaf's gradient has its layout.
            dz, dc = both[:, :r].contiguous(), both[:, r:]
        else:
            dz = dx_rows @ ctx.weight[:r].mT
        if needs_table:
            dtable = ctx.coordinates.table_gradient(table, dc, **ctx.use)
        return _reshaped(dz, dx) if needs_dz else None, dtable, *[None] * 6


def _reshaped(rows: Tensor, like: Tensor) -> Tensor:
    """[tokens, n] as [..., n], with the leading sizes of `like`.

    To autograd it is no view, so that Megatron may free its storage once it has been sent.
    """
    shape = (*like.shape[:-1], rows.size(-1))
    result: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return result


def _rows(x: Tensor) -> Tensor:
    """[..., n] as the matrix [tokens, n]."""
    return x.reshape(-1, x.size(-1))


def _check_shapes(
    name: str,
    tensor: Tensor,
    side: int,
    coordinates: Coordinates | None,
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
