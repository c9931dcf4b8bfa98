# SPDX-License-Identifier: Apache-2.0
"""Projectors: the matrix A ∈ R^{d×r} of one boundary, and how it moves.

Both sides of a boundary hold a copy. Each side accumulates its own part of dA over the
micro-batches of a step; once the parts have been summed, both sides take the same step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from mapl import spel
from mapl.fp32 import add_mm_wide, full_precision, keep_dtype
from mapl.operands import Operands
from mapl.stiefel import msign, random_stiefel, retract

MOMENTUM = 0.9


class Projector(nn.Module):
    """What every projector has. A, momentum and gradient stay fp32 in a model of any dtype.

    Args:
        hidden_size: d.
        rank: r, 1 ≤ r ≤ d.
        generator: private CPU generator; the two sides of a boundary seed theirs alike.

    Attributes:
        A: [d, r] fp32 parameter that no other optimizer sees (``requires_grad`` is False).
        momentum: [d, r] fp32 buffer, or None.
        grad: [d, r] fp32, the sum of dA since ``zero_grad``, or None. Not in the state dict. A
            fixed projector has one between ``propose`` and ``restart`` alone.
        skipped_steps: 0-dim int64 on A's device, steps skipped since construction. Not in the
            state dict.
        learns: whether A moves by a gradient. If not, no dA need be formed.
        operands: what the GEMMs over tokens multiply by, for A as it is now.

    Raises:
        ValueError: not 1 ≤ rank ≤ hidden_size.
    """

    learns: bool
    momentum: Tensor | None
    grad: Tensor | None
    skipped_steps: Tensor

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.A = nn.Parameter(random_stiefel(hidden_size, rank, generator), requires_grad=False)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.A.device)
        self.operands = Operands()

    def accumulate(self, dA: Tensor) -> None:
        """Add one micro-batch's part of dA, [d, r] fp32."""
        raise NotImplementedError

    def accumulate_product(
        self, left: Tensor, right: Tensor, basis: Tensor | None = None, alpha: float = 1
    ) -> None:
        """Add α leftᵀ·right or, with a basis P, α Pᵀ·(leftᵀ·right), accumulated in fp32.

        The product with Pᵀ is linear, so it is formed once, when somebody reads ``grad``.

        Args:
            left: [tokens, d], or [tokens, k] with a basis, in the model's dtype.
            right: [tokens, r], likewise.
            basis: P [k, d].
            alpha: α.
        """
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Start a new sum of dA. The accumulator stays allocated, whatever ``set_to_none`` says."""
        self.operands.clear()
        if self.grad is not None:
            self.grad.zero_()

    def step(self, lr: float) -> Tensor:
        """Move A by ``grad`` at learning rate ``lr``; return ``ok``, a 0-dim bool tensor.

        Where ``ok`` is False the gradient was not finite, nothing has moved, and
        ``skipped_steps`` has grown by one. Nothing waits for the device.
        """
        raise NotImplementedError

    def propose(self, a: Tensor | None) -> None:
        """Have ``grad`` hold, in place of dA, this side's term of what A is to become.

        The two sides' terms are summed as those of dA are; then :meth:`restart` takes the sum.

        Args:
            a: [d, r] fp32, orthonormal columns, on the side that chooses; None, for 0, on the
                other one.
        """
        if self.grad is None:
            self.grad = torch.zeros_like(self.A)
        self.zero_grad()
        if a is not None:
            self.grad.copy_(a)

    @torch.no_grad()
    def restart(self) -> None:
        """A ← retract(``grad``), after :meth:`propose`; momentum and gradient begin anew.

        A learned projector's :meth:`step` then moves A by rounding alone, and is ok.
        """
        assert self.grad is not None, "nothing was proposed"
        self.A.copy_(retract(self.grad))
        if self.momentum is not None:
            self.momentum.zero_()
        self.zero_grad()
        if not self.learns:
            self.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        follow = keep_dtype(fn)
        super()._apply(follow, recurse)
        self.skipped_steps = follow(self.skipped_steps)
        if self.grad is not None:
            self.grad = follow(self.grad)
        return self


class FixedProjector(Projector):
    """A random orthonormal A that no gradient moves: the paper's "fixed orthogonal" ablation."""

    learns = False

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__(hidden_size, rank, generator)
        self.momentum = self.grad = None

    def accumulate(self, dA: Tensor) -> None:
        """Nothing: there is no gradient to keep."""

    def accumulate_product(
        self, left: Tensor, right: Tensor, basis: Tensor | None = None, alpha: float = 1
    ) -> None:
        """Nothing, likewise."""

    def step(self, lr: float) -> Tensor:
        """Nothing; always ok."""
        return torch.ones((), dtype=torch.bool, device=self.A.device)


class _MovingProjector(Projector):
    """Accumulator, momentum and skipped steps, shared by the projectors that learn."""

    learns = True
    momentum: Tensor
    _grad: Tensor
    _with_basis: tuple[Tensor, Tensor] | None  # P, and what is still to be multiplied by it

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__(hidden_size, rank, generator)
        self.register_buffer("momentum", torch.zeros_like(self.A))
        self.grad = torch.zeros_like(self.A)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """See :meth:`Projector.zero_grad`."""
        self._with_basis = None  # nobody has asked for it
        super().zero_grad(set_to_none)

    @property
    def grad(self) -> Tensor:
        """The sum of dA since ``zero_grad``, what came with a basis included."""
        if self._with_basis is not None:
            basis, inner = self._with_basis
            with torch.no_grad(), full_precision(inner.device):
                self._grad.addmm_(basis.to(inner.dtype).mT, inner)
            self._with_basis = None
        return self._grad

    @grad.setter
    def grad(self, total: Tensor) -> None:
        self._grad, self._with_basis = total, None

    def accumulate(self, dA: Tensor) -> None:
        """Add one micro-batch's part of dA, [d, r] fp32.

        Raises:
            ValueError: another shape.
        """
        if dA.shape != self.A.shape:
            raise ValueError(f"dA must have A's shape {tuple(self.A.shape)}, got {tuple(dA.shape)}")
        self._grad.add_(dA)

    @torch.no_grad()
    def accumulate_product(
        self, left: Tensor, right: Tensor, basis: Tensor | None = None, alpha: float = 1
    ) -> None:
        """See :meth:`Projector.accumulate_product`."""
        if basis is None:
            add_mm_wide(self._grad, left.mT, right, alpha)
            return
        if self._with_basis is None or self._with_basis[0] is not basis:
            inner = self.grad.new_zeros(basis.size(0), self.A.size(1))
            self._with_basis = basis, inner
        add_mm_wide(self._with_basis[1], left.mT, right, alpha)


class LearnedProjector(_MovingProjector):
    """A learned on the Stiefel manifold by SPEL (arXiv 2606.05484, 2601.21487), β = 0.9.

    ``step`` raises ValueError unless 0 ≤ lr < 1.
    """

    def step(self, lr: float) -> Tensor:
        """Move A and the momentum in place; see :meth:`Projector.step`."""
        (ok,) = _step_learned([self], lr)
        return ok


class UnconstrainedProjector(_MovingProjector):
    """A learned without the manifold: the paper's Muon ablation, β = 0.9.

    m ← β m + (1 − β) g;  A ← A − α msign(m). Only the start is orthonormal. ``step`` raises
    ValueError for a learning rate that is negative or not finite.
    """

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Move A and the momentum in place; see :meth:`Projector.step`."""
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"projector learning rate must be finite and >= 0, got {lr}")
        momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * self.grad
        ok = momentum.isfinite().all()
        a = self.A - lr * msign(momentum)
        self.A.copy_(torch.where(ok, a, self.A))
        self.momentum.copy_(torch.where(ok, momentum, self.momentum))
        self.skipped_steps.add_(~ok)
        return ok


PROJECTORS: dict[str, type[Projector]] = {
    "learned": LearnedProjector,
    "fixed": FixedProjector,
    "unconstrained": UnconstrainedProjector,
    "subspace": FixedProjector,  # what moves is the model: see mapl.subspace
}


@torch.no_grad()
def step_all(projectors: Sequence[Projector], lr: float) -> list[Tensor]:
    """Step each projector; learned ones of equal shape in the same launches, see `spel.step_all`.

    Each moves by the very bits that its own :meth:`Projector.step` would move it by.

    Args:
        projectors: on one device.
        lr: learning rate.

    Returns:
        ``ok`` of each, 0-dim bool.

    Raises:
        ValueError: as the projectors' ``step``.
    """
    learned = [projector for projector in projectors if isinstance(projector, LearnedProjector)]
    results = dict(zip(learned, _step_learned(learned, lr), strict=True))
    return [results[p] if isinstance(p, LearnedProjector) else p.step(lr) for p in projectors]


@torch.no_grad()
def _step_learned(projectors: Sequence[LearnedProjector], lr: float) -> list[Tensor]:
    """SPEL's step of each and the count of those skipped."""
    moving = [(projector.A, projector.grad, projector.momentum) for projector in projectors]
    a, grad, momentum = zip(*moving, strict=True) if moving else ((), (), ())
    results = spel.step_all(a, grad, momentum, lr, MOMENTUM)
    for projector, ok in zip(projectors, results, strict=True):
        projector.skipped_steps.add_(~ok)
    return results
