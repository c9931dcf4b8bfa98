# SPDX-License-Identifier: Apache-2.0
"""`--mapl-projector-start-step N`: projectors start anew, from the data's spectrum.

    M = Σ RᵀR over all tokens of the step        V: the leading r eigenvectors of M
    A ← V·polar(VᵀA)

R = X − C P, the anchored residual of `mapl.geometry`. Of all A of rank r, those that span V keep
the most of that step's energy; of these it is the one nearest to A as it is (`nearest_basis`). The
eigenvectors themselves would give latents of very unequal size, the largest first, of which codecs
with a scale for each group of numbers lose the small ones. This basis mixes them as the A that was
drawn did, needs no convention for signs, and moves A the least.

One boundary a step: boundary p starts in step N + p, from what it sends when those before it have
started. Behind a boundary M is shaped by what its A lets through, so if all started in one step,
each behind the first would start from a subspace that the others have just left.

What happens in `grads.finalize` of that step alone, at the two ends of that boundary:

1. The sending side sums M over the processes of its stage and takes the new A.
2. It crosses as that side's term of the projector's exchange, in place of dA, beside a term of 0
   from the receiving side: framed, counted and shared out over ranks as the gradient is. A fixed
   projector, which has no exchange, has this one.
3. Both sides make what they hold then, the same bits, orthonormal: that is A. Momentum and gradient
   are 0, so SPEL's own step retracts A once more, by rounding, and does not count as skipped.

All of it comes before the optimizer, and so heeds neither its loss scale nor the steps that it
skips. The step is Megatron's iteration: a resumed job starts those boundaries whose step is still
to come.

Cost, in each of these steps alone: one product of n·d² multiplications in fp64 a micro-batch of n
tokens, an all-reduce of M over the stage's processes, and a d×d eigenvalue problem and an SVD of
r×r in fp64 in each of them, for which the next stage waits. Memory: 8 d² bytes for M and as much
again several times while it is taken apart, and n·d numbers of fp32 for R. In other steps a
comparison of two numbers.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mapl.coordinates import Coordinates
from mapl.geometry import add_second_moment, anchored_residual, leading_directions
from mapl.stiefel import nearest_basis
from megatron.mapl.geometry import current_step, training_step
from megatron.mapl.port import Port
from megatron.mapl.runtime import MaplRuntime

if TYPE_CHECKING:
    from megatron.mapl.model import StageBoundaries


class StepMoment:
    """M of one step at one boundary's sending end, over the tokens that this process holds.

    Args:
        step: its number, as Megatron counts iterations from 1.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._total: Tensor | None = None

    def observe(self, x: Tensor, coordinates: Coordinates | None, basis: Tensor | None) -> None:
        """Adds a micro-batch if it is one of that step; arguments as of `anchored_residual`.

        Layers that run again for the backward pass do not send again, so each comes here once.
        """
        if training_step() != self._step:
            return
        with torch.no_grad():
            residual = anchored_residual(x, coordinates, basis)
            if self._total is None:
                d = residual.size(1)
                self._total = residual.new_zeros(d, d, dtype=torch.float64)
            add_second_moment(self._total, residual)

    def take(self) -> Tensor:
        """M [d, d] fp64; it is kept no longer."""
        total, self._total = self._total, None
        assert total is not None, f"no micro-batch of step {self._step} was sent"
        return total


def is_due(runtime: MaplRuntime, port: Port) -> bool:
    """Whether a boundary's projector starts in this step; the same at both of its ends."""
    return runtime.plan.projector_starts[port.boundary] == current_step()


def propose(port: Port, stage: "StageBoundaries") -> None:
    """Before the exchange: has the projector's term of it be what A is to become.

    To be called on every process of the stage.

    Args:
        port: an end of a boundary that is due.
        stage: whose port it is.

    Raises:
        RuntimeError: activations of the step are not finite.
    """
    assert port.projector is not None
    chosen = None
    if port.is_outlet:
        assert stage.moment is not None
        chosen = _start(stage.moment.take(), port.projector.A, stage.groups.tp_dp_cp, port.boundary)
    port.projector.propose(chosen)


def _start(moment: Tensor, a: Tensor, everyone: Any, boundary: int) -> Tensor:
    """What A [d, r] is to become, fp32, the same bits on all processes of the stage.

    Tensor-parallel ranks that hold the same tokens make M a multiple of what it is, which moves no
    eigenvector.
    """
    if everyone.size() > 1:
        dist.all_reduce(moment, group=everyone)
    if not moment.isfinite().all():
        raise RuntimeError(
            f"boundary {boundary}: activations of step {current_step()} are not finite, and have "
            "no spectrum that --mapl-projector-start-step could start from; resume with another "
            "step, or without the flag"
        )
    chosen = nearest_basis(leading_directions(moment, a.size(1)), a).float().contiguous()
    if everyone.size() > 1:
        # Each sends a share. Where the r-th eigenvalue is close to the next or VᵀA is singular,
        # rounding decides, and shares of different matrices would make up no basis.
        dist.broadcast(chosen, group=everyone, group_src=0)
    return chosen
