# SPDX-License-Identifier: Apache-2.0
"""The SPEL step of equal-shaped projectors, all in the same launches.

The mathematics is `mapl.spel.spel_step`'s. What differs is where it is done: with tall X [d, r] and
G = XᵀX, a PolarExpress step X ← X(aI + bG + cG²) takes G to G(aI + bG + cG²)², and all of these
square factors commute. So several steps are taken on [r, r] matrices, each product a sixteenth of
a tall one at d = 16 r, and their product Q is applied to X once. G squares the spread of X's
singular values, and rounding in it grows with the steps; hence G is formed anew after the third.
Measured on spreads from 10 to 1e5 and on matrices of low rank, msign then errs by at most 2.2 times
what the plain iteration in fp32 does, and mostly by as much.

The retraction is Y(YᵀY)^(−1/2) for Y = A − αD. Y's singular values lie in [1 − α, 1 + α], so at
α ≤ 0.1 E = I − YᵀY has a norm of at most 0.21, and eight terms of the series of (I − E)^(−1/2)
leave less than 2e-7. Taken as Y + Y(E/2 + 3/8 E² + …), all that is rounded but Y itself is small.

A step takes 8 tall products, of which 3 are symmetric and done by half, where the plain step takes
36; 26 launches of square products come to it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mapl.ops.kernels import spel_products as products
from mapl.ops.kernels.spel_products import (
    DEPTH,
    SPLIT,
    SQUARE,
    SQUARE_DEPTH,
    SQUARE_OPTIONS,
    SUM,
    TALL,
    TALL_OPTIONS,
)
from mapl.ops.launch import launch
from mapl.ops.sizes import cdiv, next_power_of_2

#: The largest α: the polynomial that retracts needs it to be small.
HIGHEST_RATE = 0.1
#: PolarExpress's (a, b, c) as `mapl.stiefel.msign` has them, and the step after which G is renewed.
POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.8750, -1.2500, 0.3750),
)
RENEWED_AFTER = 3
#: Those of E, E², … in (I − E)^(−1/2).
INVERSE_ROOT = tuple(math.comb(2 * k, k) / 4**k for k in range(1, 9))
#: How far from I, entry by entry, the Gram matrix of A − αD may be: 0.21 and a margin. An A that
#: takes it further is not on the manifold.
FURTHEST = 0.3


def spel_step_batch(
    a: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum: Sequence[Tensor],
    lr: Tensor,
    beta: float,
) -> Tensor:
    """One SPEL step of B projectors in place; nothing waits for the device.

    Deterministic, and bit for bit the same for a projector in whatever batch. Can be captured in a
    CUDA graph: α is read from `lr` at each replay, β is baked in.

    Args:
        a: B matrices [d, r] fp32 with d ≥ r, each contiguous and 16-byte aligned, orthonormal
            columns to within 0.05.
        grad: B gradients, likewise.
        momentum: B momenta, likewise.
        lr: 0-dim fp32 on the same device, α. A step with an α outside of [0, 0.1] is not ok.
        beta: β.

    Returns:
        ok, [B] bool. Where it is False nothing has changed: α, the gradient or the new momentum is
        out of range or not finite, or A is off the manifold.

    Raises:
        ValueError: matrices that kernels cannot take.
    """
    for name, matrices in (("A", a), ("grad", grad), ("momentum", momentum)):
        for matrix in matrices:
            if matrix.dtype != torch.float32 or matrix.size(0) < matrix.size(1):
                raise ValueError(
                    f"SPEL kernels take fp32 with at least as many rows as columns, got {name} "
                    f"{matrix.dtype} of shape {tuple(matrix.shape)}"
                )
            if not matrix.is_contiguous() or matrix.data_ptr() % 16:
                raise ValueError(f"SPEL kernels need {name} contiguous and 16-byte aligned")
    batch = _Batch(a, grad, momentum, lr)
    batch.update_momentum(beta)
    batch.descend()
    return batch.commit()


class _Batch:
    """The operands of one step and its scratch memory."""

    def __init__(
        self, a: Sequence[Tensor], grad: Sequence[Tensor], momentum: Sequence[Tensor], lr: Tensor
    ) -> None:
        self.size, (self.d, self.r), self.lr = len(a), a[0].shape, lr
        self.a, self.grad, self.momentum = (_spread(part) for part in (a, grad, momentum))
        device = lr.device
        self.new_momentum = torch.empty(self.size, self.d, self.r, device=device)
        self.y = torch.empty_like(self.new_momentum)
        self.x = torch.empty_like(self.new_momentum)
        # Allocated apart: Triton compiles apart what is aligned and what is not.
        self.largest = torch.zeros(self.size, dtype=torch.int32, device=device)
        self.distance = torch.zeros_like(self.largest)
        self.unscaled = torch.full_like(self.largest, products.BITS_OF_TWO)
        self.norm = torch.empty(self.size, device=device)
        self.ok = torch.empty(self.size, dtype=torch.bool, device=device)
        across = cdiv(self.r, TALL)
        self.tall_grid = (across, cdiv(self.d, TALL), self.size)

    def update_momentum(self, beta: float) -> None:
        """new_momentum = β m + (1 − β)(g − A sym(Aᵀg))."""
        symmetric = self._gram(self.a, self.grad, products.SYMMETRIC_PART)
        self._launch_tall(
            products.momentum_kernel,
            *self.a, *self.grad, *self.momentum, symmetric, self.new_momentum, self.largest,
            beta, 1 - beta,
        )  # fmt: skip

    def descend(self) -> None:
        """y = A − α msign(new_momentum)."""
        momentum = _spread(self.new_momentum.unbind())
        q = self._polynomial(
            self._gram(momentum, momentum, products.NORMALISED), POLAR_EXPRESS[:RENEWED_AFTER]
        )
        self._launch_tall(
            products.apply_kernel, self.new_momentum, q, self.x, self.largest, self.norm
        )
        x = _spread(self.x.unbind())
        q = self._polynomial(self._gram(x, x, products.PLAIN), POLAR_EXPRESS[RENEWED_AFTER:])
        self._launch_tall(products.descend_kernel, *self.a, self.x, q, self.lr, self.y)

    def commit(self) -> Tensor:
        """A = y retracted and m = new_momentum, where all is sound."""
        y = _spread(self.y.unbind())
        correction = self._inverse_root(self._gram(y, y, products.FROM_IDENTITY))
        self._launch_tall(
            products.commit_kernel,
            self.y, correction, self.new_momentum, *self.a, *self.momentum, self.lr,
            self.largest, self.distance, self.ok, HIGHEST_RATE, FURTHEST,
        )  # fmt: skip
        return self.ok

    def _launch_tall(self, kernel: Any, *args: Tensor | float) -> None:
        """A kernel of tall products; d and the sizes of tiles follow its arguments."""
        constants = {"R": self.r, "TALL": TALL, "DEPTH": DEPTH, **TALL_OPTIONS}
        launch(kernel, self.tall_grid, *args, self.d, **constants)

    def _gram(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], mode: int) -> Tensor:
        """LᵀR as `mode` says, a square matrix."""
        splits, across = cdiv(self.d, SPLIT), cdiv(self.r, TALL)
        triangle = mode != products.SYMMETRIC_PART
        scale = self.largest if mode == products.NORMALISED else self.unscaled
        tiles = across * (across + 1) // 2 if triangle else across**2
        parts = torch.empty(self.size, splits, self.r, self.r, device=self.lr.device)
        launch(
            products.gram_kernel, (tiles, splits, self.size), *left, *right, scale, parts, self.d,
            R=self.r, TRIANGLE=triangle, TALL=TALL, SPLIT=SPLIT, DEPTH=DEPTH, **TALL_OPTIONS,
        )  # fmt: skip
        gram = self._empty_square()
        across = cdiv(self.r, SUM)
        launch(
            products.sum_kernel, (across * (across + 1) // 2, self.size),
            parts, gram, self.norm, self.distance,
            SPLITS=splits, R=self.r, MODE=mode, WIDTH=next_power_of_2(self.r), SUM=SUM,
            **SQUARE_OPTIONS,
        )  # fmt: skip
        return gram

    def _polynomial(self, g: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        """Q that takes X with XᵀX = G through these steps: the product of their P.

        1. P = aI + bG + cG²
        2. Q ← QP, and GP beside it
        3. G ← (GP)P, unless this was the last step
        """
        q: Tensor | None = None
        for step, of_step in enumerate(coefficients, 1):
            (p,) = self._square(_Term(g, *of_step), right=g)
            last = step == len(coefficients)
            left = [factor for factor in (None if last else g, q) if factor is not None]
            through = self._square(*map(_Term, left), right=p) if left else []
            q = p if q is None else through[-1]
            if not last:
                (g,) = self._square(_Term(through[0]), right=p)
        assert q is not None
        return q

    def _inverse_root(self, e: Tensor) -> Tensor:
        """(I − E)^(−1/2) − I = cE + E²(cI + cE + E²(cI + cE + E²(cI + cE + cE²))), all c others."""
        first, *pairs = INVERSE_ROOT[:5]
        square, series = self._square(_Term(e), _Term(e, *INVERSE_ROOT[5:]), right=e)
        for one, linear in (pairs[2:], pairs[:2], (0.0, first)):
            (series,) = self._square(_Term(square, one, linear, added=e), right=series)
        return series

    def _square(self, term: "_Term", *other: "_Term", right: Tensor) -> list[Tensor]:
        """one·I + linear·D + quadratic·LR for one or two terms."""
        terms = [term, *other]
        out = [torch.empty_like(right) for _ in terms]
        last, across = terms[-1], cdiv(self.r, SQUARE)
        launch(
            products.square_kernel, (across, across, len(terms) * self.size),
            term.left, last.left, right, term.added, last.added, out[0], out[-1], self.size,
            term.one, term.linear, term.quadratic, last.one, last.linear, last.quadratic,
            R=self.r, SQUARE=SQUARE, DEPTH=SQUARE_DEPTH, **SQUARE_OPTIONS,
        )  # fmt: skip
        return out

    def _empty_square(self) -> Tensor:
        """B square matrices, each as its three parts."""
        shape = self.size, 3, self.r, self.r
        return torch.empty(shape, dtype=torch.bfloat16, device=self.lr.device)


class _Term:
    """one·I + linear·D + quadratic·LR, short of R; D is L unless it is given."""

    def __init__(
        self,
        left: Tensor,
        one: float = 0.0,
        linear: float = 0.0,
        quadratic: float = 1.0,
        added: Tensor | None = None,
    ) -> None:
        self.left, self.added = left, left if added is None else added
        self.one, self.linear, self.quadratic = one, linear, quadratic


def _spread(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """An operand spread over allocations: its first matrix and the offsets of all from it, [B]."""
    first = matrices[0]
    offsets = tuple((m.data_ptr() - first.data_ptr()) // m.element_size() for m in matrices)
    key = offsets, first.device
    captures = first.is_cuda and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        # By fills: a copy from the host would wait for the device.
        rows = [torch.full((), at, dtype=torch.int64, device=first.device) for at in offsets]
        table = torch.stack(rows)
        # What is made while a graph is captured is filled at replay alone and is the graph's own.
        if not captures:
            if len(_tables) == _MOST_TABLES:
                del _tables[next(iter(_tables))]  # the oldest
            _tables[key] = table
    elif captures:
        _read_by_graphs.add(table)
    return first, table


#: Training takes six a shape, always the same; a caller with new gradients each step, ever others.
_MOST_TABLES = 256
#: Tables of offsets by those offsets and the device.
_tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
#: Those whose memory a graph reads at each replay: never dropped.
_read_by_graphs: set[Tensor] = set()
