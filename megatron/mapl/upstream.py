# SPDX-License-Identifier: Apache-2.0
"""Mends of faults in Megatron-LM, each with the versions that need it.

All mends stand in `MENDS`. They apply on CPU and GPU alike, change nothing where the fault does not
show, and refuse to start when the symbol that they mend has moved.
"""

import importlib.util
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from megatron.mapl import versions
from megatron.mapl.patching import replace


@dataclass(frozen=True)
class Mend:
    """What goes wrong, in which megatron-core versions, and the function that mends it."""

    fault: str
    versions: str
    apply: Callable[[], None]


def _skip_compiling_prebuilt_helpers() -> None:
    import megatron.core.datasets.utils as utils

    compile_helpers = utils.compile_helpers

    def compile_if_missing() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            compile_helpers()

    replace(utils, "compile_helpers", compile_if_missing)


def _torch_norm_under_sequence_parallelism() -> None:
    import megatron.core.transformer.torch_norm as torch_norm

    build = torch_norm.WrappedTorchNorm.__new__

    def build_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        config.sequence_parallel = False
        try:
            norm = build(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = True
        # Megatron sums the gradients of parameters with this tag over tensor parallel ranks.
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    replace(torch_norm.WrappedTorchNorm, "__new__", build_norm)


def _distributed_optimizer_resume() -> None:
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return  # their Adam keeps one step for a parameter group: none of the four faults shows
    optimizer_class = distrib_optimizer.DistributedOptimizer
    state_dict = optimizer_class.state_dict
    load_state_dict = optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def state_dict_with_state(self: Any) -> Any:
        """Fault 1: `state_dict` reads "step" of a state that is empty before the first step."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    _allocate_adam_state(self.optimizer.state[parameter], parameter)
        return state_dict(self)

    def set_states_keeping_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        """Faults 2 and 3: copies into a leaf that requires grad, and wants a tensor for "step"."""
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main_param].get("step")
        with torch.no_grad():
            set_states(self, model_param, tensors if step is None else {**tensors, "step": step})

    def load_state_dict_with_own_steps(self: Any, state: Any) -> None:
        """Fault 4: one "step" tensor is shared by all parameters, so it counts once for each."""
        load_state_dict(self, state)
        for parameter_state in self.optimizer.state.values():
            if torch.is_tensor(parameter_state.get("step")):
                parameter_state["step"] = parameter_state["step"].clone()

    replace(optimizer_class, "state_dict", state_dict_with_state)
    replace(optimizer_class, "_set_main_param_and_optimizer_states", set_states_keeping_step)
    replace(optimizer_class, "load_state_dict", load_state_dict_with_own_steps)


def _allocate_adam_state(state: dict[str, Any], parameter: torch.Tensor) -> None:
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def _resume_beside_empty_groups() -> None:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    sharded_state_dict = Float16OptimizerWithFloat16Params.sharded_state_dict
    load_state_dict = Float16OptimizerWithFloat16Params.load_state_dict
    key = "fp32_from_fp16_params"

    def sharded_without_empty_groups(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """An empty list of the first stage would be part of what all stages load."""
        state: dict[str, Any] = sharded_state_dict(self, *args, **kwargs)
        kept = [group for group in state.pop(key) if group]
        return {**state, key: kept} if kept else state

    def load_with_empty_groups(self: Any, state: dict[str, Any]) -> None:
        """Megatron copies list by list: those without parameters take their places again."""
        saved, groups = state.get(key, []), self.fp32_from_float16_groups
        if "fp32_from_fp16" not in state and len(saved) == sum(bool(group) for group in groups):
            rest = iter(saved)
            state = {**state, key: [next(rest) if group else [] for group in groups]}
        load_state_dict(self, state)

    replace(Float16OptimizerWithFloat16Params, "sharded_state_dict", sharded_without_empty_groups)
    replace(Float16OptimizerWithFloat16Params, "load_state_dict", load_with_empty_groups)


def _help_with_bare_percent_sign() -> None:
    import megatron.training.arguments as arguments

    add_megatron_arguments = arguments.add_megatron_arguments

    def add_with_escaped_help(parser: Any) -> Any:
        parser = add_megatron_arguments(parser)
        for action in parser._actions:
            if action.help:  # argparse formats it: %(default)s and %% are meant, a bare % is not
                action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
        return parser

    replace(arguments, "add_megatron_arguments", add_with_escaped_help)


def _checkpoint_writers_outlive_sigterm() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    get_queue = filesystem_async.get_write_results_queue

    def get_queue_beyond_sigterm(*args: Any, **kwargs: Any) -> Any:
        resource_tracker.ensure_running()  # which else would be started now, and unblock SIGTERM
        # The process behind the queue inherits the mask. It ends when this one tells it to.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return get_queue(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    replace(filesystem_async, "get_write_results_queue", get_queue_beyond_sigterm)


MENDS = (
    Mend(
        "--help fails at a bare per cent sign in the help of a flag",
        ">=0.19,<0.20",
        _help_with_bare_percent_sign,
    ),
    Mend(
        "compile_helpers runs make in a wheel that has no Makefile, though the extension is built",
        ">=0.17,<0.20",
        _skip_compiling_prebuilt_helpers,
    ),
    Mend(
        "torch's norms, used without Transformer Engine and Apex, refuse sequence parallelism",
        ">=0.17,<0.20",
        _torch_norm_under_sequence_parallelism,
    ),
    Mend(
        "DistributedOptimizer over torch AdamW (no Transformer Engine, no Apex) fails to resume",
        ">=0.17,<0.20",
        _distributed_optimizer_resume,
    ),
    Mend(
        "where a stage has no parameter in a group, as inner ones have no embedding for that of "
        "--decoupled-lr, a 16-bit optimizer fails to resume, or takes the fp32 parameters of one "
        "group for those of another",
        ">=0.17,<0.20",
        _resume_beside_empty_groups,
    ),
    Mend(
        "SIGTERM to all processes of a job, as SLURM preempts, ends the one through which writers "
        "of checkpoints report, so that the save that --exit-signal-handler starts fails",
        ">=0.17,<0.20",
        _checkpoint_writers_outlive_sigterm,
    ),
)


def install() -> None:
    """Applies the mends that the installed megatron-core needs; to be called once.

    Raises:
        RuntimeError: a mended symbol has moved.
    """
    version = versions.installed()
    for mend in MENDS:
        if version in SpecifierSet(mend.versions, prereleases=True):
            mend.apply()
