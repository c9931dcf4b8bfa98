# SPDX-License-Identifier: Apache-2.0
"""Composes a pretraining job: flags, mends, hooks, then Megatron's own training loop.

Everything that is replaced in Megatron for the boundaries' sake stands in this file: in `run` what
plain jobs need too, in `_hook_into_megatron` the rest. Staged and emulated transfers replace
Megatron's two functions that start them (`MegatronTransfers`). Mends of its faults stand in
upstream.py, the stand-ins for a GPU in cpu.py, and what a GPU without NVIDIA's packages needs in
gpu.py and attention.py.
"""

import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace as replace_fields
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.pipeline_parallel import schedules
from megatron.training import (
    checkpointing,
    inprocess_restart,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training import training as megatron_training
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.vocab_utils import calculate_padded_vocab_size

from mapl.anchors import default_buckets
from mapl.config import EmulationConfig
from mapl.plan import plan_boundaries
from mapl.token_ids import id_size
from megatron.mapl import (
    arguments,
    attention,
    checkpoint,
    cpu,
    gpt,
    gpu,
    grads,
    metrics,
    model,
    staging,
    subspace,
    upstream,
    virtual_stages,
)
from megatron.mapl.emulation import LinkEmulation
from megatron.mapl.errors import exit_with_error, exit_without_peer
from megatron.mapl.optimizer import with_projectors, without_anchor_decay
from megatron.mapl.p2p_communication import MaplP2PCommunicator, receiving_ahead
from megatron.mapl.patching import replace
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.staging import Gloo, StagedTransport
from megatron.mapl.transfers import PeerError, leave_together, lost_peer
from megatron.mapl.transport import MegatronTransfers, Transport


def run(*, program_start: float, cpu_mode: bool) -> None:
    """Runs the job that the command line describes, to its end.

    Args:
        program_start: when the process started, for Megatron's timing report.
        cpu_mode: whether `cpu.install` went to CPU mode.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    if cpu_mode:
        cpu.patch_megatron()
    upstream.install()
    replace(
        checkpointing,
        "load_args_from_checkpoint",
        checkpoint.taking_mapl_args(checkpointing.load_args_from_checkpoint),
    )
    try:
        args = _parse(cpu_mode)
        model_config = gpt_config_from_args(args)
        emulation = arguments.emulation_from_args(args)
        runtime = _runtime(args, model_config)
    except ValueError as error:
        exit_with_error(error)
    if not cpu_mode and attention.wanted(args):
        replace(LocalSpecProvider, "core_attention", attention.core_attention)
    # Parses the command line again, with Megatron's flags alone: `--help` must meet ours first.
    model_config.pre_wrap_hooks.append(partial(_agree, args=args))
    staged = staging.needed(args.distributed_backend, cpu_mode=cpu_mode)
    links = _Links(emulation, runtime, args, staged=staged)
    if staged or runtime is not None:
        # Each transfer's work orders the streams; a wait for the whole device adds nothing.
        model_config.transformer.batch_p2p_sync = False
    if staged:
        # Megatron's DDP reduces gradients in groups of one too, coalesced, which gloo refuses to do
        # with tensors of a GPU; what it does not refuse goes to the host and back.
        reduce = gpu.without_lonely_reductions(torch.distributed.all_reduce)
        replace(torch.distributed, "all_reduce", reduce)
    model_config.pre_wrap_hooks.append(links.start)
    wrapped_pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    loading = checkpoint.guarded_load(megatron_training.load_checkpoint, args, runtime)
    replace(megatron_training, "load_checkpoint", loading)
    finish = partial(_finish, runtime, links, cpu_mode)
    train = _finishing_on_exit(megatron_training.train, finish)
    replace(megatron_training, "train", train)
    if runtime is not None:
        depth = arguments.receive_ahead(args, runtime.config)
        _hook_into_megatron(model_config, runtime, depth)
    try:
        wrapped_pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            gpt.build_datasets,
            ModelType.encoder_or_decoder,
            gpt.forward_step,
            store=store,
            get_embedding_ranks=gpt.get_embedding_ranks,
        )
        finish()
    except RuntimeError as error:
        if isinstance(error, PeerError):
            exit_without_peer(str(error))
        lost = lost_peer(error)
        if lost is None:
            raise
        traceback.print_exc()  # what it says of a peer was judged by its text
        exit_without_peer(lost)


def _finish(runtime: MaplRuntime | None, links: "_Links", cpu_mode: bool) -> None:
    if runtime is not None:
        metrics.write_traffic(runtime)
    links.close()
    if cpu_mode or links.staged:
        leave_together()


class _Links:
    """What carries tensors between stages, from the time on when there are process groups.

    With NCCL `torch.distributed` does by itself, and in CPU mode unless links are emulated.

    Attributes:
        staged: whether tensors of GPUs go through the host.
    """

    def __init__(
        self, config: EmulationConfig, runtime: MaplRuntime | None, args: Any, *, staged: bool
    ) -> None:
        self._config, self._runtime, self.staged = config, runtime, staged
        self._timeout = timedelta(minutes=args.distributed_timeout_minutes)
        self._closing = ExitStack()

    def start(self, chunks: list[Any]) -> list[Any]:
        """Pre-wrap hook on every process, of plain jobs too."""
        transport: Transport | None = None
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        bandwidth, latency = self._config.emulate_bandwidth, self._config.emulate_latency
        if bandwidth is not None or latency:
            transport = emulation = LinkEmulation.start(
                bandwidth_mbit=bandwidth,
                latency_ms=latency or 0.0,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                stages=stages,
                timeout=self._timeout,
            )
            self._closing.callback(emulation.close)
        if self.staged and stages > 1:
            transport = staged = StagedTransport(transport or Gloo(), self._timeout)
            self._closing.callback(staged.close)  # before the links that it sends over
        if transport is not None:
            self._closing.callback(MegatronTransfers(transport).undo)
            if self._runtime is not None:
                self._runtime.transport = transport
        return chunks

    def close(self) -> None:
        """Waits until all is sent and received; to be called before the process group's end.

        Raises:
            RuntimeError: a transfer failed, or not all is over in time.
        """
        self._closing.close()


def _finishing_on_exit(train: Callable[..., Any], finish: Callable[[], None]) -> Callable[..., Any]:
    """Megatron's `train`, which ends the process by itself at `--exit-interval` and on signals."""

    def train_and_finish(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except SystemExit:  # raised on all processes together, after the last save
            finish()
            raise

    return train_and_finish


def _parse(cpu_mode: bool) -> Any:
    """Megatron's namespace, with our flags and, without a GPU, with what CPU mode sets.

    Raises:
        ValueError: bad input; the message names the flag, its value and the remedy.
    """

    def add_arguments(parser: Any) -> Any:
        parser.set_defaults(**(cpu.ARGUMENT_DEFAULTS if cpu_mode else gpu.argument_defaults()))
        return arguments.add_arguments(parser)

    args = parse_and_validate_args(
        extra_args_provider=add_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    gpt.check_arguments(args)
    if cpu_mode:
        cpu.check_arguments(args)
        print_rank_0("> no GPU on this machine: CPU mode, with gloo between processes")
    else:
        gpu.settle(args)
    return args


def _runtime(args: Any, model_config: Any) -> MaplRuntime | None:
    """What the boundaries need, or None for plain Megatron.

    Raises:
        ValueError: as `_parse`.
    """
    config = arguments.config_from_args(args)
    if config is None:
        return None
    arguments.check_supported(args, config)
    pipeline = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size or 1
    stages = config.virtual_stages or pipeline * virtual
    plan = plan_boundaries(
        config,
        hidden_size=args.hidden_size,
        boundaries=stages - 1,
        shards=arguments.split_ranks(args, config),
    )
    arguments.check_projector_starts(args, plan)
    vocab_size = _padded_vocab_size(args)
    if config.anchor == "bigram" and config.anchor_buckets is None:
        # By the vocabulary itself: another tensor-parallel size may pad it otherwise.
        args.mapl_anchor_buckets = default_buckets(args.vocab_size or vocab_size)
        config = replace_fields(config, anchor_buckets=args.mapl_anchor_buckets)
    runtime = MaplRuntime(
        config=config,
        plan=plan,
        vocab_size=vocab_size,
        pipeline_size=pipeline,
        pipeline_dtype=model_config.transformer.pipeline_dtype,
        split_ranks=arguments.split_ranks(args, config),
        seed=args.seed,
        timeout_after_first_step=(
            args.distributed_timeout_seconds_after_init
            if args.distributed_backend == "gloo"
            else None
        ),
    )
    id_size(runtime.vocab_size)  # refuses a vocabulary that no id type holds
    return runtime


def _padded_vocab_size(args: Any) -> int:
    """Tokens of the model's vocabulary, padded as Megatron pads it."""
    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    return int(
        calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    )


def _agree(chunks: list[Any], args: Any) -> list[Any]:
    """Pre-wrap hook on every process, plain ones too: a peer with other flags would hang."""
    try:
        arguments.check_same_on_all_ranks(args)
    except ValueError as error:
        exit_with_error(error)
    return chunks


def _hook_into_megatron(model_config: Any, runtime: MaplRuntime, receive_ahead: int) -> None:
    """The seams: model, gradients, communicator, schedule, optimizer, log, save."""
    attach = virtual_stages.attach if runtime.config.virtual_stages else model.attach
    model_config.pre_wrap_hooks.append(partial(attach, runtime=runtime))
    if runtime.config.projector == "subspace":
        runtime.subspace = subspace.Subspace(runtime)
        model_config.pre_wrap_hooks.append(runtime.subspace.attach)
    model_config.transformer.finalize_model_grads_func = partial(grads.finalize, runtime=runtime)
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
