# SPDX-License-Identifier: Apache-2.0
"""SPEL: spectral steepest descent on the Stiefel manifold (arXiv 2601.21487)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mapl.ops.dispatch import runs_gemms, use_triton
from mapl.stiefel import msign, retract, tangent


def spel_step(
    a: Tensor, grad: Tensor, momentum: Tensor, lr: float, beta: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """One SPEL step, as a pure function: no argument is changed, and nothing waits for the device.

    1. g_R = g − A sym(Aᵀg)
    2. m ← β m + (1 − β) g_R
    3. D = msign(m)
    4. A ← retract(A − α D)

    There is no weight decay: it would do nothing but pull against the retraction. The step is
    deterministic, so two sides that hold equal A and m and see equal gradients stay equal.

    Args:
        a: [d, r] fp32, orthonormal columns.
        grad: [d, r] fp32, gradient with respect to A as if A were free.
        momentum: [d, r] fp32, m; zeros at the start.
        lr: α, the spectral norm of the step, in [0, 1): from 1 on, A − αD may lose rank.
        beta: β, in [0, 1).

    Returns:
        The new A, the new m, and ``ok``, a 0-dim bool tensor on A's device. ``ok`` is False, and
        A and m are what they were, bit for bit, if the gradient is not finite or overflows here.

    Raises:
        ValueError: ``lr`` or ``beta`` out of range, or shapes or dtypes that do not fit.
    """
    _check(a, grad, momentum, lr, beta)
    new_momentum = beta * momentum + (1 - beta) * tangent(a, grad)
    new_a = retract(a - lr * msign(new_momentum))
    ok = grad.isfinite().all() & new_momentum.isfinite().all() & new_a.isfinite().all()
    return torch.where(ok, new_a, a), torch.where(ok, new_momentum, momentum), ok


def _check(a: Tensor, grad: Tensor, momentum: Tensor, lr: float, beta: float) -> None:
    if not 0 <= lr < 1:
        raise ValueError(f"SPEL learning rate must lie in [0, 1), got {lr}")
    if not 0 <= beta < 1:
        raise ValueError(f"SPEL momentum must lie in [0, 1), got {beta}")
    for name, tensor in (("grad", grad), ("momentum", momentum)):
        if tensor.shape != a.shape or tensor.dtype != a.dtype:
            raise ValueError(
                f"SPEL {name} must be {a.dtype} of A's shape {tuple(a.shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


@torch.no_grad()
def step_all(
    a: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum: Sequence[Tensor],
    lr: float | Tensor,
    beta: float = 0.9,
) -> list[Tensor]:
    """Take the step of :func:`spel_step` with each A and its momentum, in place.

    Where operations run as kernels, equal shapes are stepped together, in about 40 launches and
    without a wait for the device, up to α = 0.1; above, and elsewhere, one by one in plain torch.
    Either way a projector's result does not depend, in any bit, on what else is in the batch: the
    two sides of a boundary hold it among different others and must stay equal. They must take the
    same way, though: the same α, MAPL_OPS and kind of device.

    The kernels can be captured in a CUDA graph. A number for α is baked in at capture; a tensor is
    read at every replay.

    Args:
        a: matrices [d, r] fp32, of any shapes, on one device, orthonormal columns.
        grad: their gradients.
        momentum: their momenta.
        lr: α in [0, 1), or a 0-dim fp32 tensor on that device in [0, 0.1], which kernels do not
            wait for: with a value outside, the step is skipped.
        beta: β.

    Returns:
        ``ok`` of each, 0-dim bool. Where it is False its A and momentum are unchanged, bit for bit.

    Raises:
        ValueError: as :func:`spel_step`; or an α on another device than its matrices.
    """
    for one in zip(a, grad, momentum, strict=True):
        _check(*one, 0.0 if isinstance(lr, Tensor) else lr, beta)
    if a and use_triton(a[0]) and runs_gemms(a[0]) and _is_low(lr):
        return _step_by_kernels(a, grad, momentum, lr, beta)
    results = []
    for matrix, its_grad, its_momentum in zip(a, grad, momentum, strict=True):
        new_a, new_momentum, ok = spel_step(matrix, its_grad, its_momentum, float(lr), beta)
        matrix.copy_(new_a)
        its_momentum.copy_(new_momentum)
        results.append(ok)
    return results


def _is_low(lr: float | Tensor) -> bool:
    """Whether kernels take α; a tensor they look at themselves."""
    from mapl.ops.kernels.spel import HIGHEST_RATE

    return isinstance(lr, Tensor) or lr <= HIGHEST_RATE


def _step_by_kernels(
    a: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum: Sequence[Tensor],
    lr: float | Tensor,
    beta: float,
) -> list[Tensor]:
    from mapl.ops.kernels.spel import spel_step_batch

    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float32, device=a[0].device)
    if lr.dtype != torch.float32 or lr.ndim or any(lr.device != matrix.device for matrix in a):
        raise ValueError(
            "SPEL takes its learning rate as a number or as a 0-dim fp32 tensor on the device of "
            f"all matrices, got {lr.dtype} of shape {tuple(lr.shape)} on {lr.device}"
        )
    shapes: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(a):
        shapes.setdefault(matrix.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in shapes.values():
        chosen_a, chosen_grad, chosen_momentum = (
            [matrices[index] for index in indices] for matrices in (a, grad, momentum)
        )
        ok = spel_step_batch(chosen_a, chosen_grad, chosen_momentum, lr, beta)
        # Autograd does not see what kernels write; who saved or cached an A must.
        torch.autograd.graph.increment_version([*chosen_a, *chosen_momentum])
        results.update(zip(indices, ok.unbind(), strict=True))
    return [results[index] for index in range(len(a))]


class Spel(torch.optim.Optimizer):
    """``spel_step`` as a PyTorch optimizer, for parameters that live on the Stiefel manifold.

    A step whose gradient is not finite leaves parameter and momentum alone and is counted in
    ``state[param]["skipped_steps"]``, an int64 tensor on the parameter's device.

    Args:
        params: fp32 matrices [d, r] with orthonormal columns, or parameter groups of them.
        lr: α of :func:`spel_step`.
        momentum: β of :func:`spel_step`.

    Raises:
        ValueError: a rate out of range, or a parameter that is not an fp32 matrix with d ≥ r.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        momentum: float = 0.9,
    ) -> None:
        if not 0 <= lr < 1:
            raise ValueError(f"SPEL learning rate must lie in [0, 1), got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"SPEL momentum must lie in [0, 1), got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as PyTorch does, refusing parameters that SPEL cannot hold on a manifold."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2 or param.size(0) < param.size(1) or param.dtype != torch.float32:
                self.param_groups.pop()
                raise ValueError(
                    "SPEL takes fp32 matrices with at least as many rows as columns, got "
                    f"{param.dtype} of shape {tuple(param.shape)}"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_parameter(param, group["lr"], group["momentum"])
        return loss

    def _step_parameter(self, param: Tensor, lr: float, beta: float) -> None:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
            state["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=param.device)
        a, state["momentum"], ok = spel_step(param, param.grad, state["momentum"], lr, beta)
        param.copy_(a)
        # Optimizer.load_state_dict casts every tensor to the parameter's dtype, this count too.
        state["skipped_steps"] = state["skipped_steps"].to(torch.int64) + ~ok

    def skipped_steps(self) -> int:
        """Steps skipped so far, over all parameters. Waits for the device."""
        return sum(int(state["skipped_steps"].item()) for state in self.state.values())
