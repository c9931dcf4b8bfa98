# SPDX-License-Identifier: Apache-2.0
"""SPEL beside Megatron's optimizer, whichever that is.

The projectors stay outside of DDP and of the distributed optimizer, which shards flat buffers and
cannot take a matrix step. `with_projectors` gives Megatron's optimizer object a class that adds
three things to its own: clear the projectors' gradients, take the loss scale off them, and step the
projectors when (and only when) the optimizer itself steps, after which the model's weights may have
to go back into a subspace (subspace.py). A parameter group without parameters lets Megatron's
scheduler drive their learning rate.
"""

import types
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey

from mapl.projectors import step_all
from megatron.mapl.model import ANCHOR_TAG
from megatron.mapl.runtime import MaplRuntime


class _WithProjectors:
    """Mixed in before the class of Megatron's optimizer."""

    _mapl: MaplRuntime
    _mapl_group: dict[str, Any]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for projector in self._mapl.projectors():
            projector.zero_grad()
        super().zero_grad(set_to_none)  # type: ignore[misc]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*super().param_groups, self._mapl_group]  # type: ignore[misc]

    def prepare_grads(self) -> bool:
        # By the scale that these gradients were made with: the call below may change it.
        for projector in self._mapl.projectors():
            if projector.grad is not None:
                projector.grad /= self.get_loss_scale()  # type: ignore[attr-defined]
        return bool(super().prepare_grads())  # type: ignore[misc]

    def step_with_ready_grads(self) -> bool:
        """Not reached when Megatron skips the step for overflow: then no projector moves."""
        success = bool(super().step_with_ready_grads())  # type: ignore[misc]
        if success:
            learning = [p for p in self._mapl.projectors() if p.learns]
            step_all(learning, self._mapl.config.projector_lr_mult * self._mapl_group["lr"])
            if self._mapl.subspace is not None:
                self._mapl.subspace.project()
        return success


def with_projectors(optimizer: Any, config: Any, runtime: MaplRuntime) -> Any:
    """Megatron's `optimizer`, stepping the projectors too; the object shares its state.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
        config: its `OptimizerConfig`.
    """
    name = f"{type(optimizer).__name__}WithProjectors"
    combined_class = types.new_class(name, (_WithProjectors, type(optimizer)))
    combined: Any = object.__new__(combined_class)
    combined.__dict__ = optimizer.__dict__
    combined._mapl = runtime
    combined._mapl_group = {
        "params": [],
        "lr": 0.0,
        "max_lr": config.lr,
        "min_lr": config.min_lr or 0.0,
        "wd_mult": 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": False,
    }
    return combined


def without_anchor_decay(config_overrides: dict[Any, Any] | None) -> dict[Any, Any]:
    """Adds to Megatron's overrides: anchor tables, like norms, have no weight decay."""
    return {**(config_overrides or {}), ParamKey(attr=ANCHOR_TAG): {"wd_mult": 0.0}}
