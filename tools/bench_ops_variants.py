# SPDX-License-Identifier: Apache-2.0
"""Ways to write a boundary's encoder and decoder, ours and what it is compared with.

Each takes one micro-batch through a stage, its decoder and its encoder, forward and backward, and
leaves the same results: X̂ and Z, dẐ and dX, dA added to an fp32 buffer, dE added to one [V, k].

What can be done once a step (operands made of A and P, the product with Pᵀ that dA ends with) is
not timed, in none of them.

- ours: `mapl.boundary`.
- eager: the formula as written in METHOD's terms, (X − E[ids] P) A and Ẑ Aᵀ + E[ids] P, under
  autograd. The dense gradient of E is added to the buffer, as Megatron's DDP does.
- compiled: the same through torch.compile.
- by hand: gather, concatenate, one cuBLAS GEMM; backwards written out; index_add_ for E.

Shapes: N tokens, d hidden size, r rank, k anchor rank, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mapl.anchors import FactorizedAnchor
from mapl.boundary import decode, encode
from mapl.projectors import LearnedProjector


@dataclass(frozen=True)
class Shape:
    """One point of the grid."""

    n: int
    d: int
    r: int
    k: int
    v: int

    def __str__(self) -> str:
        return f"d={self.d} r={self.r} r_a={self.k} V={self.v}"


class Boundary:
    """Parameters of one side, and the fp32 buffers of their gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype = shape, dtype
        # Random numbers in place of an orthonormal A and P, which take long to draw at this size.
        self.projector = LearnedProjector(1, 1, generator).cuda()
        a = torch.randn(shape.d, shape.r, device="cuda") / shape.d**0.5
        self.projector.A = torch.nn.Parameter(a, requires_grad=False)
        self.projector.grad = torch.zeros_like(a)
        self.anchor = FactorizedAnchor(shape.v, shape.k, shape.k, generator).cuda()
        self.anchor.basis = torch.randn(shape.k, shape.d, device="cuda") / shape.d**0.5
        self.anchor.to(dtype)
        table = self.anchor.E
        torch.nn.init.normal_(table)
        self.main_grad = torch.zeros(table.shape, device="cuda")
        table.main_grad, table.grad_added_to_main_grad = self.main_grad, False  # type: ignore

    def zero(self) -> None:
        """Starts new sums of gradients."""
        self.projector.zero_grad()
        self.main_grad.zero_()


@dataclass
class Batch:
    """What one micro-batch brings, [N, d] and [N, r]."""

    x: Tensor
    z: Tensor
    dx: Tensor
    dz: Tensor
    ids: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> "Batch":
        """Fresh numbers; ids are uniform over the vocabulary, the hardest case for the table."""
        x, dx = (torch.randn(shape.n, shape.d, device="cuda", dtype=dtype) for _ in range(2))
        z, dz = (torch.randn(shape.n, shape.r, device="cuda", dtype=dtype) for _ in range(2))
        ids = torch.randint(0, shape.v, (shape.n,), device="cuda")
        return cls(x.requires_grad_(), z.requires_grad_(), dx, dz, ids)


def _formula_encode(x: Tensor, ids: Tensor, table: Tensor, basis: Tensor, a: Tensor) -> Tensor:
    return (x - F.embedding(ids, table) @ basis) @ a.to(x.dtype)


def _formula_decode(z: Tensor, ids: Tensor, table: Tensor, basis: Tensor, a: Tensor) -> Tensor:
    return z @ a.to(z.dtype).mT + F.embedding(ids, table) @ basis


class _HandEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, hand):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, ids)
        ctx.hand = hand
        return (x @ hand.down).addmm_(hand.table[ids], hand.basis_down, alpha=-1)

    @staticmethod
    def backward(ctx, dz):  # type: ignore[no-untyped-def]
        x, ids = ctx.saved_tensors
        hand = ctx.hand
        _add(hand.boundary.projector.grad, x.mT, dz)
        _add(hand.before_basis, hand.table[ids].mT, dz)
        hand.boundary.main_grad.index_add_(0, ids, (dz @ hand.basis_down.mT).float(), alpha=-1)
        return dz @ hand.down.mT, None, None


class _HandDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, ids, hand):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, ids)
        ctx.hand = hand
        return torch.cat([z, hand.table[ids]], 1) @ hand.up

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        z, ids = ctx.saved_tensors
        hand, r = ctx.hand, z.size(1)
        both = dx @ hand.up.mT
        _add(hand.boundary.projector.grad, dx.mT, z)
        hand.boundary.main_grad.index_add_(0, ids, both[:, r:].float())
        return both[:, :r], None, None


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)


class Variant:
    """One way to write both directions of a stage.

    Args:
        boundary: parameters and buffers.
        batch: inputs; the gradients of `x` and `z` are replaced in each step.
    """

    def __init__(self, boundary: Boundary, batch: Batch) -> None:
        self.boundary, self.batch = boundary, batch

    def forward(self) -> tuple[Tensor, Tensor]:
        """X̂ and Z."""
        raise NotImplementedError

    def take_gradients(self) -> None:
        """Adds what the backward pass left elsewhere to the buffers."""

    def once_a_step(self) -> None:
        """What is left to do for the gradient of A after all micro-batches of a step."""

    def step(self) -> list[Tensor]:
        """One micro-batch, in the order in which a stage does it.

        Returns:
            X̂ and Z.
        """
        batch = self.batch
        # As Megatron's DDP does once a gradient has reached its buffer.
        batch.x.grad = batch.z.grad = self.boundary.anchor.E.grad = None
        x, z = self.forward()
        z.backward(batch.dz)
        x.backward(batch.dx)
        self.take_gradients()
        return [x.detach(), z.detach()]


class Ours(Variant):
    """`mapl.boundary`."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """See `Variant`."""
        anchor, projector = self.boundary.anchor, self.boundary.projector
        coordinates = anchor.coordinates(self.batch.ids)
        x = decode(self.batch.z, coordinates, anchor.basis, projector)
        return x, encode(self.batch.x, coordinates, anchor.basis, projector)


class Eager(Variant):
    """The formula, as written; A and E are leaves whose gradients autograd forms."""

    encode, decode = staticmethod(_formula_encode), staticmethod(_formula_decode)

    def __init__(self, boundary: Boundary, batch: Batch) -> None:
        super().__init__(boundary, batch)
        self.a = boundary.projector.A.detach().requires_grad_()
        self.table = boundary.anchor.E.detach().requires_grad_()
        self.basis = boundary.anchor.basis.to(boundary.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """See `Variant`."""
        batch, basis = self.batch, self.basis
        x = self.decode(batch.z, batch.ids, self.table, basis, self.a)
        return x, self.encode(batch.x, batch.ids, self.table, basis, self.a)

    def take_gradients(self) -> None:
        """See `Variant`."""
        assert self.a.grad is not None and self.table.grad is not None
        self.boundary.projector.accumulate(self.a.grad)
        self.boundary.main_grad.add_(self.table.grad)
        self.a.grad = self.table.grad = None


class Compiled(Eager):
    """The same, each direction through torch.compile."""

    encode = staticmethod(torch.compile(_formula_encode, dynamic=False))
    decode = staticmethod(torch.compile(_formula_decode, dynamic=False))


class ByHand(Variant):
    """The best without fusion: gather, concatenate, cuBLAS, backwards written out."""

    def __init__(self, boundary: Boundary, batch: Batch) -> None:
        super().__init__(boundary, batch)
        a, basis, dtype = boundary.projector.A.detach(), boundary.anchor.basis, boundary.dtype
        self.table = boundary.anchor.E.detach()
        self.down, self.basis_down = a.to(dtype), (basis @ a).to(dtype)
        self.up = torch.cat([a.mT.to(dtype), basis.to(dtype)])
        self.before_basis = torch.zeros(basis.size(0), a.size(1), device=a.device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """See `Variant`."""
        batch = self.batch
        x = _HandDecode.apply(batch.z, batch.ids, self)
        return x, _HandEncode.apply(batch.x, batch.ids, self)

    def once_a_step(self) -> None:
        """See `Variant`."""
        basis = self.boundary.anchor.basis
        self.boundary.projector.grad.addmm_(basis.mT, self.before_basis, alpha=-1)
        self.before_basis.zero_()


VARIANTS: dict[str, type[Variant]] = {
    "ours": Ours,
    "eager": Eager,
    "compiled": Compiled,
    "by hand": ByHand,
}
