# SPDX-License-Identifier: Apache-2.0
"""Weights kept in one subspace: the constraint of Subspace Networks (arXiv 2506.01260).

With U ∈ St(d, k) and a frozen table F of tokens, everything that is added to the residual stream
behind E[t] + F[t] lies in span U if the weights that write to it do:

    W ← U Uᵀ W     for output projections, [d, n]: their columns lie in span U
    E ← E U Uᵀ     for the embedding, [V, d]: its rows do

Then X − F[t] = U Uᵀ(X − F[t]), and a boundary that sends Uᵀ(X − F[t]) loses nothing.

Shapes: d hidden size, k rank of the subspace.
"""

import torch
from torch import Tensor

from mapl.fp32 import full_precision


@torch.no_grad()
def project_(weight: Tensor, u: Tensor, dim: int) -> None:
    """Move a weight to the nearest one in the subspace, in place: U Uᵀ W or W U Uᵀ.

    Nothing larger than k numbers for each column (row) is allocated.

    Args:
        weight: [d, n] for ``dim`` 0, [n, d] for ``dim`` 1.
        u: U [d, k], orthonormal columns, of the weight's dtype.
        dim: the dimension of the weight that is d wide.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(weight, u, dim)
    with full_precision(weight.device):
        if dim == 0:
            torch.mm(u, u.mT @ weight, out=weight)
        else:
            torch.mm(weight @ u, u.mT, out=weight)


@torch.no_grad()
def departure(weight: Tensor, u: Tensor, dim: int) -> Tensor:
    """‖W − U Uᵀ W‖ / ‖W‖ (Frobenius), the part of a weight outside of the subspace.

    Args:
        weight, u, dim: as for `project_`.

    Returns:
        0-dim, from 0 to 1; 0 for a weight that is 0.

    Raises:
        ValueError: as `project_`.
    """
    inside = weight.clone()
    project_(inside, u, dim)
    size = torch.linalg.vector_norm(weight)
    outside = torch.linalg.vector_norm(weight - inside)
    return torch.where(size > 0, outside / size, 0.0)


def _check(weight: Tensor, u: Tensor, dim: int) -> None:
    if dim not in (0, 1) or weight.ndim != 2 or u.ndim != 2 or weight.size(dim) != u.size(0):
        raise ValueError(
            f"U of shape {tuple(u.shape)} does not fit dimension {dim} of a weight of shape "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != u.dtype:
        raise ValueError(f"the weight is {weight.dtype}, U is {u.dtype}; give both in one dtype")
