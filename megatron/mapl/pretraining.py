# SPDX-License-Identifier: Apache-2.0
"""Puts boundaries into a script's pretraining job, whoever wrote the script.

A script reads its flags with Megatron's `parse_and_validate_args` and hands over to its `pretrain`.
`Job.install` replaces both before the script imports them: the first then understands `--mapl-*`
flags, the second has the model built with boundaries. `pretrain_gpt.py` is such a script too.

Everything that is replaced in Megatron for the boundaries' sake stands in this file: in
`Job.install` and `Job._prepare` what plain jobs need too, in `_hook_into_megatron` the rest. Staged
and emulated transfers replace Megatron's two functions that start them (`MegatronTransfers`). Mends
of its faults stand in upstream.py, the stand-ins for a GPU in cpu.py, and what a GPU without
NVIDIA's packages needs in gpu.py and attention.py. `versions.SYMBOLS` lists all names.
"""

import inspect
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import megatron.training as training_package
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.pipeline_parallel import schedules
from megatron.training import arguments as megatron_arguments
from megatron.training import checkpointing, get_args, initialize, print_rank_0
from megatron.training import training as megatron_training

from mapl.config import EmulationConfig
from megatron.mapl import (
    arguments,
    attention,
    checkpoint,
    cpu,
    gpu,
    grads,
    job_runtime,
    metrics,
    model,
    model_building,
    staging,
    subspace,
    upstream,
    virtual_stages,
)
from megatron.mapl.errors import exit_with_error, exit_without_peer
from megatron.mapl.links import Links
from megatron.mapl.optimizer import with_projectors, without_anchor_decay
from megatron.mapl.p2p_communication import MaplP2PCommunicator, receiving_ahead
from megatron.mapl.patching import replace
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.transfers import PeerError, leave_together, lost_peer

Function = Callable[..., Any]


class Job:
    """One process of the job that a script describes.

    Args:
        cpu_mode: whether `cpu.install` went to CPU mode.
    """

    def __init__(self, *, cpu_mode: bool) -> None:
        self._cpu_mode = cpu_mode
        self._args: Any = None
        self._emulation = EmulationConfig()
        self._runtime: MaplRuntime | None = None
        #: Whether the job shall have boundaries, by its flags or by the checkpoint that it loads.
        self._wanted = False
        self._links: Links | None = None
        #: Megatron's pre-wrap hooks: each takes all model chunks of the process and returns them.
        self._hooks: list[Function] = []

    @property
    def runtime(self) -> MaplRuntime | None:
        """The boundaries that the flags ask for; None for a plain job, or before they are read."""
        return self._runtime

    def install(self) -> None:
        """Replaces what the script is going to import; to be called once, before it does."""
        if self._cpu_mode:
            cpu.patch_megatron()
        upstream.install()
        loading = checkpoint.taking_mapl_args(checkpointing.load_args_from_checkpoint)
        replace(checkpointing, "load_args_from_checkpoint", loading)
        parse, validate = megatron_arguments.parse_args, megatron_arguments.parse_and_validate_args
        replace(megatron_arguments, "parse_args", self._with_our_flags(parse))
        replace(megatron_arguments, "parse_and_validate_args", self._settling(validate))
        pretrain = self._with_boundaries(megatron_training.pretrain)
        expecting = self._expecting_pretrain(initialize.initialize_megatron)
        for module in (training_package, megatron_training):
            replace(module, "pretrain", pretrain)
        for module in (training_package, megatron_training, initialize):
            replace(module, "initialize_megatron", expecting)

    def end(self) -> None:
        """To be called when the script has come to its end.

        Raises:
            ValueError: it was to train with boundaries, and did not call `pretrain`.
        """
        if self._wanted and self._links is None:
            raise ValueError(
                "it has ended without a call of megatron.training.pretrain, so --mapl-rank had no "
                "effect; call it, or leave --mapl-rank out"
            )
        self._leave()

    def _with_our_flags(self, parse_args: Function) -> Function:
        """Megatron's `parse_args`, by which all ways to its flags go."""

        @wraps(parse_args)
        def parse(extra_args_provider: Any = None, ignore_unknown_args: bool = False) -> Any:
            def add_arguments(parser: Any) -> Any:
                defaults = cpu.ARGUMENT_DEFAULTS if self._cpu_mode else gpu.argument_defaults()
                parser.set_defaults(**defaults)
                if extra_args_provider is not None:
                    parser = extra_args_provider(parser)
                return arguments.add_arguments(parser)

            try:
                arguments.check_source(sys.argv)
            except ValueError as error:
                exit_with_error(error)
            args = parse_args(add_arguments, ignore_unknown_args)
            self._wanted = hasattr(args, arguments.PREFIX + "rank")
            return args

        return parse

    def _settling(self, parse_and_validate_args: Function) -> Function:
        @wraps(parse_and_validate_args)
        def parse_and_settle(*args: Any, **kwargs: Any) -> Any:
            # Outside of `try`: an error of the script's or of Megatron's keeps its traceback.
            namespace = parse_and_validate_args(*args, **kwargs)
            try:
                self._settle(namespace)
            except ValueError as error:
                exit_with_error(error)
            return namespace

        return parse_and_settle

    def _settle(self, args: Any) -> None:
        """Refuses what would not work, chooses devices, and plans the boundaries.

        Raises:
            ValueError: bad input; the message names the flag, its value and the remedy.
        """
        if self._cpu_mode:
            cpu.check_arguments(args)
            print_rank_0("> no GPU on this machine: CPU mode, with gloo between processes")
        else:
            gpu.settle(args)
        self._emulation = arguments.emulation_from_args(args)
        self._args, self._runtime = args, job_runtime.from_args(args)
        self._wanted = self._runtime is not None

    def _expecting_pretrain(self, initialize_megatron: Function) -> Function:
        """Megatron's start of a job, which comes before any work, however a script gets there.

        It is not to be got to past `pretrain` as it stands here: by a training loop of the script's
        own, or by names that were imported before `install`.
        """

        @wraps(initialize_megatron)
        def initialize_with_pretrain(*args: Any, **kwargs: Any) -> Any:
            if self._wanted and self._links is None:
                exit_with_error(
                    ValueError(
                        "it initializes Megatron, but not by the megatron.training.pretrain that "
                        "puts boundaries in; call that one, import it no earlier than in the "
                        "script, or leave --mapl-rank out"
                    )
                )
            return initialize_megatron(*args, **kwargs)

        return initialize_with_pretrain

    def _with_boundaries(self, pretrain: Function) -> Function:
        """Megatron's `pretrain`, its model built with boundaries, its end a common one."""
        signature = inspect.signature(pretrain)

        @wraps(pretrain)
        def pretrain_with_boundaries(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            try:
                self._prepare()
                model_building.put_hooks(call.arguments, self._hooks, self._args, self._runtime)
            except ValueError as error:
                exit_with_error(error)
            try:
                result = pretrain(*call.args, **call.kwargs)
                self._finish()
            except RuntimeError as error:
                if isinstance(error, PeerError):
                    exit_without_peer(str(error))
                lost = lost_peer(error)
                if lost is None:
                    raise
                traceback.print_exc()  # what it says of a peer was judged by its text
                exit_without_peer(lost)
            return result

        return pretrain_with_boundaries

    def _prepare(self) -> None:
        """Everything in Megatron's way from here on; a job that restarts in-process has it already.

        Raises:
            ValueError: the script has not gone the way on which its flags are read.
        """
        if self._args is None:
            if self._wanted:
                raise ValueError(
                    "it calls megatron.training.pretrain without megatron.training.arguments."
                    "parse_and_validate_args, after which --mapl-* flags are checked; call that "
                    "first, as Megatron-LM's own scripts do, or leave --mapl-rank out"
                )
            self._settle(get_args())  # what the script has set, which Megatron goes by
        args, runtime = self._args, self._runtime
        if self._links is not None:
            if runtime is not None:
                raise ValueError(
                    "it calls megatron.training.pretrain a second time, for which there are no "
                    "boundaries; train one model in a process, or leave --mapl-rank out"
                )
            return
        if not self._cpu_mode and attention.wanted(args):
            replace(LocalSpecProvider, "core_attention", attention.core_attention)
        staged = staging.needed(args.distributed_backend, cpu_mode=self._cpu_mode)
        self._links = Links(self._emulation, runtime, args, staged=staged)
        if staged:
            # Megatron's DDP reduces gradients in groups of one too, coalesced, which gloo refuses
            # to do with tensors of a GPU; what it does not refuse goes to the host and back.
            reduce = gpu.without_lonely_reductions(torch.distributed.all_reduce)
            replace(torch.distributed, "all_reduce", reduce)
        self._hooks += [partial(_agree, args=args), self._links.start]
        if runtime is not None:
            self._hooks.append(partial(model_building.check_chunks, runtime=runtime))
        if staged or runtime is not None:
            self._hooks.append(_order_by_transfers)
        loading = checkpoint.guarded_load(megatron_training.load_checkpoint, args, runtime)
        replace(megatron_training, "load_checkpoint", loading)
        train = _finishing_on_exit(megatron_training.train, self._finish_and_leave)
        replace(megatron_training, "train", train)
        if runtime is not None:
            self._hooks += _hook_into_megatron(
                runtime, arguments.receive_ahead(args, runtime.config)
            )

    def _finish(self) -> None:
        """After training: the report, and all that is still being sent."""
        if self._runtime is not None:
            metrics.write_traffic(self._runtime)
        assert self._links is not None
        self._links.close()

    def _finish_and_leave(self) -> None:
        self._finish()
        self._leave()

    def _leave(self) -> None:
        if self._cpu_mode or (self._links is not None and self._links.staged):
            leave_together()


def _finishing_on_exit(train: Function, finish: Callable[[], None]) -> Function:
    """Megatron's `train`, which ends the process by itself at `--exit-interval` and on signals."""

    def train_and_finish(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except SystemExit:  # raised on all processes together, after the last save
            finish()
            raise

    return train_and_finish


def _agree(chunks: list[Any], args: Any) -> list[Any]:
    """Pre-wrap hook on every process, plain ones too: a peer with other flags would hang."""
    try:
        arguments.check_same_on_all_ranks(args)
    except ValueError as error:
        exit_with_error(error)
    return chunks


def _order_by_transfers(chunks: list[Any]) -> list[Any]:
    """Each transfer's work orders the streams; a wait for the whole device adds nothing."""
    for chunk in chunks:
        chunk.config.batch_p2p_sync = False
    return chunks


def _hook_into_megatron(runtime: MaplRuntime, receive_ahead: int) -> list[Function]:
    """The seams: gradients, communicator, schedule, optimizer, log, save; returns the model's."""
    attach = virtual_stages.attach if runtime.config.virtual_stages else model.attach
    hooks: list[Function] = [partial(attach, runtime=runtime)]
    if runtime.config.projector == "subspace":
        runtime.subspace = subspace.Subspace(runtime)
        hooks.append(runtime.subspace.attach)
    replace(megatron_training, "finalize_model_grads", partial(grads.finalize, runtime=runtime))
    # Looked up at each schedule call, which builds a communicator a step.
    replace(schedules, "P2PCommunicator", partial(MaplP2PCommunicator, runtime=runtime))
    if receive_ahead:
        name = "forward_backward_pipelining_without_interleaving"
        schedule = receiving_ahead(getattr(schedules, name), receive_ahead, runtime)
        replace(schedules, name, schedule)

    build_optimizer = megatron_training.get_megatron_optimizer

    def build_with_projectors(config: Any, chunks: Any, **kwargs: Any) -> Any:
        # NCCL wants all of a group in its first operation; not every stage exchanges projectors.
        torch.distributed.barrier(group=runtime.stages[0].groups.pp)
        checkpoint.check_sides(runtime)  # both drew the same projector, whatever their hardware
        kwargs["config_overrides"] = without_anchor_decay(kwargs.get("config_overrides"))
        optimizer = build_optimizer(config, chunks, **kwargs)
        if runtime.subspace is not None:
            runtime.subspace.check_optimizer()
            runtime.subspace.settle(loaded=False)
        return with_projectors(optimizer, config, runtime)

    replace(megatron_training, "get_megatron_optimizer", build_with_projectors)
    recording = metrics.recording(megatron_training.training_log, runtime)
    replace(megatron_training, "training_log", recording)
    saving = checkpoint.guarded_save(megatron_training.save_checkpoint, runtime)
    replace(megatron_training, "save_checkpoint", saving)
    return hooks
