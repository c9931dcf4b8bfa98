# SPDX-License-Identifier: Apache-2.0
"""`--mapl-projector-start-step N`: in step N every projector starts anew, from the data's spectrum.

    M = Σ RᵀR over all tokens of the step        A ← the leading r eigenvectors of M

R = X − C P, the anchored residual of `mapl.geometry`. Of all A of rank r, these keep the most of
that step's energy. What happens in `grads.finalize` of that step alone:

1. The sending side sums M over the processes of its stage and takes the eigenvectors V.
2. V crosses as that side's term of the projector's exchange, in place of dA, beside a term of 0
   from the receiving side: framed, counted and shared out over ranks as the gradient is. A fixed
   projector, which has no exchange, has this one.
3. Both sides make what they hold then, the same bits, orthonormal: that is A. Momentum and gradient
   are 0, so SPEL's own step retracts A once more, by rounding, and does not count as skipped.

All of it comes before the optimizer, and so heeds neither its loss scale nor the steps that it
skips. The step is Megatron's iteration: a resumed job does this if and only if step N is still to
come.

The boundaries start at once, each from what it sends in step N. Behind the first one that has been
shaped by the projectors as they were drawn, through which it came.

Cost, in step N alone: one product of n·d² multiplications in fp64 a micro-batch of n tokens, an
all-reduce of M over the stage's processes, and a d×d eigenvalue problem in fp64 in each of them,
for which the next stage waits. Memory: 8 d² bytes for M and as much again several times while it is
taken apart, and n·d numbers of fp32 for R. In other steps a comparison of two numbers.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mapl.coordinates import Coordinates
from mapl.geometry import add_second_moment, anchored_residual, leading_directions
from megatron.mapl.geometry import current_step, training_step
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


def is_due(runtime: MaplRuntime) -> bool:
    """Whether the projectors start in the step that is being trained; the same everywhere."""
    return runtime.config.projector_start_step == current_step()


def propose(stage: "StageBoundaries") -> None:
    """Before the exchange: has each projector's term of it be what A is to become.

    To be called on every process of the stage.

    Raises:
        RuntimeError: activations of the step are not finite.
    """
    if stage.inlet is not None and stage.inlet.projector is not None:
        stage.inlet.projector.propose(None)
    if stage.outlet is not None and stage.outlet.projector is not None:
        assert stage.moment is not None
        directions = _directions(
            stage.moment.take(),
            stage.outlet.projector.A.size(1),
            stage.groups.tp_dp_cp,
            stage.outlet.boundary,
        )
        stage.outlet.projector.propose(directions)


def _directions(moment: Tensor, rank: int, everyone: Any, boundary: int) -> Tensor:
    """V [d, r] fp32, the same bits on all processes of the stage.

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
    directions = leading_directions(moment, rank).float().contiguous()
    if everyone.size() > 1:
        # Each sends a share. Where eigenvalues are close, rounding decides what the eigenvectors
        # are, and shares of different ones would make up no basis.
        dist.broadcast(directions, group=everyone, group_src=0)
    return directions
