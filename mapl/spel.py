# SPDX-License-Identifier: Apache-2.0
"""SPEL: spectral steepest descent on the Stiefel manifold (arXiv 2601.21487)."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

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
    new_momentum = beta * momentum + (1 - beta) * tangent(a, grad)
    new_a = retract(a - lr * msign(new_momentum))
    ok = grad.isfinite().all() & new_momentum.isfinite().all() & new_a.isfinite().all()
    return torch.where(ok, new_a, a), torch.where(ok, new_momentum, momentum), ok


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
