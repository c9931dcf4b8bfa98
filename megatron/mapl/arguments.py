# SPDX-License-Identifier: Apache-2.0
"""The settings' dataclasses ↔ the `--mapl-*` flags, and what they refuse beside Megatron's own."""

import argparse
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch
from megatron.training.argument_utils import ArgumentGroupFactory

from mapl.codecs import check_lowrank
from mapl.config import EmulationConfig, MaplConfig
from mapl.ops.dispatch import VARIABLE as OPS_VARIABLE
from mapl.plan import BoundaryPlan, payloads_ahead
from mapl.presets import PresetConfig, with_preset
from megatron.mapl import subspace
from megatron.mapl.layout import pipeline_layout

PREFIX = "mapl_"


class _PrefixedGroupFactory(ArgumentGroupFactory):
    """Megatron's generator of flags from a dataclass, with our prefix and no defaults.

    Without defaults the namespace shows which flags the user gave; `config_from_args` fills in the
    rest from the dataclass, where each default stands once.
    """

    def _build_argparse_kwargs_from_field(self, attribute: Any) -> dict[str, Any]:
        if attribute.default is MISSING:
            attribute = copy(attribute)
            attribute.default = None  # the generator knows no field without a default
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        no = "no-" if kwargs.get("action") == "store_false" else ""
        kwargs["arg_names"] = ["--mapl-" + no + attribute.name.replace("_", "-")]
        kwargs["dest"] = PREFIX + attribute.name
        kwargs["default"] = argparse.SUPPRESS
        return kwargs


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the `--mapl-*` flags to Megatron's parser."""
    _PrefixedGroupFactory(MaplConfig).build_group(parser, "mapl")
    _PrefixedGroupFactory(PresetConfig).build_group(parser, "mapl presets")
    _PrefixedGroupFactory(EmulationConfig).build_group(parser, "mapl emulated network")
    return parser


def check_source(words: Sequence[str]) -> None:
    """Refuses `--mapl-*` flags beside `--yaml-cfg`, for which Megatron drops all other flags.

    Args:
        words: the command line.

    Raises:
        ValueError: names the first of the flags.
    """
    given = [word for word in words if word.startswith("--mapl-")]
    if given and any(word.split("=")[0] == "--yaml-cfg" for word in words):
        raise ValueError(
            f"--yaml-cfg takes the place of all other flags, so {given[0]} would have no effect; "
            "give Megatron's settings as flags"
        )


def emulation_from_args(args: Any) -> EmulationConfig:
    """The emulated network; fills the namespace with what the user left out.

    Raises:
        ValueError: a flag is out of range, or would have no effect.
    """
    given = {
        field.name: getattr(args, PREFIX + field.name, None) for field in fields(EmulationConfig)
    }
    for name, value in given.items():
        setattr(args, PREFIX + name, value)
    config = EmulationConfig(**given)
    for name, value in given.items():
        if value is None:
            continue
        flag = f"--mapl-{name.replace('_', '-')} {value}"
        if args.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"{flag} has no effect without links between stages; leave it out, or use "
                "--pipeline-model-parallel-size 2 or more"
            )
        if args.distributed_backend != "gloo":
            raise ValueError(
                f"{flag} delays what CPUs send each other, not {args.distributed_backend}; leave "
                "it out, or use --distributed-backend gloo, which GPUs can use too"
            )
    return config


def config_from_args(args: Any) -> MaplConfig | None:
    """The settings in Megatron's namespace, or None for plain Megatron.

    Fills the namespace with what the user left out, as primitive values, so that checkpoints keep
    all settings. Without `--mapl-rank` all `mapl_*` entries but `mapl_checkpoint` become None.

    Raises:
        ValueError: a flag is out of range, or given without `--mapl-rank`.
    """
    names = [field.name for field in fields(MaplConfig)]
    given = {name: getattr(args, PREFIX + name) for name in names if hasattr(args, PREFIX + name)}
    preset = getattr(args, f"{PREFIX}preset", None)
    args.mapl_preset = preset
    if "rank" not in given:
        if preset is not None:
            given["preset"] = preset
        ignored = [f"--mapl-{name.replace('_', '-')} {given[name]}" for name in given]
        if given and given != {"checkpoint": "drop"}:
            raise ValueError(
                f"{', '.join(ignored)} without --mapl-rank has no effect; add --mapl-rank, or "
                "leave it out"
            )
        for name in names:
            setattr(args, PREFIX + name, given.get(name))
        return None
    config = MaplConfig(**with_preset(preset, given))
    if config.checkpoint == "drop":
        raise ValueError(
            "--mapl-checkpoint drop loads a checkpoint into plain Megatron; leave --mapl-rank out, "
            "or use --mapl-checkpoint fresh to start the boundaries anew"
        )
    for name, value in asdict(config).items():
        setattr(args, PREFIX + name, value)
    return config


#: Megatron settings that boundaries cannot work with: dest → (flag, why).
_UNSUPPORTED = {
    "overlap_moe_expert_parallel_comm": (
        "--overlap-moe-expert-parallel-comm",
        "its schedule sends activations before the model's hooks see them",
    ),
    "use_ring_exchange_p2p": (
        "--use-ring-exchange-p2p",
        "it needs a build of PyTorch that sends activations in a ring",
    ),
    "mtp_standalone": ("--mtp-standalone", "it sends several tensors over one boundary"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "it replaces Megatron's wrapping of the model"),
    "inprocess_restart": (
        "--inprocess-restart",
        "payloads are numbered, and a restarted stage would not know where its peers are",
    ),
    "moe_use_upcycling": ("--moe-use-upcycling", "it builds a second model"),
    "perform_rl_step": ("--perform-rl-step", "it runs the model outside of the schedule"),
    "sft": ("--sft", "its packed sequences have another shape than a micro-batch"),
    "dataloader_inter_document_masking": (
        "--dataloader-inter-document-masking",
        "its packed sequences have another shape than a micro-batch",
    ),
    "hybrid_context_parallel": (
        "--hybrid-context-parallel",
        "its packed sequences have another shape than a micro-batch",
    ),
    # Megatron fills it from --heterogeneous-layers-config-path too.
    "heterogeneous_layers_config_encoded_json": (
        "--heterogeneous-layers-config-path (or -encoded-json)",
        "cuts are named by counts of equal layers",
    ),
}


def check_supported(args: Any, config: MaplConfig) -> None:
    """Refuses combinations with Megatron's flags that would fail or be silently wrong.

    Raises:
        ValueError: names the flag, its value and what to do.
    """
    for dest, (flag, why) in _UNSUPPORTED.items():
        if getattr(args, dest, None):
            raise ValueError(
                f"{flag} cannot be used with --mapl-rank: {why}; leave one of them out"
            )
    if getattr(args, "cuda_graph_impl", "none") != "none":
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} cannot be used with --mapl-rank: payloads "
            "are numbered on the host; use --cuda-graph-impl none"
        )
    if (args.save or args.load) and args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} cannot be used with --mapl-rank; use --ckpt-format "
            "torch_dist"
        )
    if mtp_before_last_stage(args):
        raise ValueError(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} cannot be "
            "used with --mapl-rank: its prediction layers (m) send several tensors over one "
            "boundary; put them into the last stage, before L"
        )
    if config.projector == "subspace":
        subspace.check_supported(args)
    step = (args.lr or 0.0) * config.projector_lr_mult
    if config.projector == "learned" and step >= 1:
        raise ValueError(
            f"--mapl-projector-lr-mult {config.projector_lr_mult} times --lr {args.lr} is "
            f"{step:g}, but a step on the manifold must be shorter than 1; lower one of them"
        )
    virtual = args.virtual_pipeline_model_parallel_size
    if virtual is not None:
        for flag, values in (
            ("--mapl-rank", config.rank),
            ("--mapl-forward-codec", config.forward_codec),
            ("--mapl-backward-codec", config.backward_codec),
        ):
            _check_links(flag, values, args.pipeline_model_parallel_size, virtual)
    if config.virtual_stages is not None:
        _check_virtual_stages(config.virtual_stages, args)
    if config.receive_ahead:
        _check_receive_ahead(config, args)
    if "lowrank" in config.backward_codec:
        check_lowrank(config.codec_settings, rows=_tokens_sent(args, config))
    if config.anchor == "bigram" and args.context_parallel_size > 1:
        raise ValueError(
            f"--mapl-anchor bigram with --context-parallel-size {args.context_parallel_size} would "
            "need the token before a part of a sequence, which another process holds; use "
            "--mapl-anchor factorized"
        )
    if config.geometry_interval is not None:
        _check_geometry_interval(config.geometry_interval, config.log_interval, args)


def check_projector_starts(args: Any, plan: BoundaryPlan) -> None:
    """Refuses starts of projectors (`--mapl-projector-start-step`) in steps that are not trained.

    How many steps a batch size that grows leaves is not known here.

    Raises:
        ValueError: names the flag, its value, the boundary and what to do.
    """
    last = args.train_iters
    if not last and args.train_samples and args.step_batch_size_schedule is None:
        last = args.train_samples // args.global_batch_size
    for boundary, step in enumerate(plan.projector_starts):
        if step is None:
            continue
        start = (
            f"--mapl-projector-start-step {step - boundary} starts the projector of boundary "
            f"{boundary} in step {step}, which"
        )
        if last and step > last:
            given = f"--train-iters {last}" if args.train_iters else f"the {last} steps of this job"
            raise ValueError(f"{start} exceeds {given}; start earlier, or train longer")
        if step in args.iterations_to_skip:
            raise ValueError(
                f"{start} is among --iterations-to-skip and has no data to start from; choose "
                "another step"
            )


def split_ranks(args: Any, config: MaplConfig) -> int:
    """How many tensor-parallel ranks share the sending of one micro-batch."""
    size = int(args.tensor_model_parallel_size)
    splits = config.tensor_parallel_split and not args.sequence_parallel
    tokens = args.seq_length // args.context_parallel_size
    return size if splits and tokens % size == 0 else 1


def _tokens_sent(args: Any, config: MaplConfig) -> int:
    """How many tokens of one micro-batch a process sends over a boundary."""
    tokens = int(args.micro_batch_size * args.seq_length // args.context_parallel_size)
    if args.sequence_parallel:
        return tokens // int(args.tensor_model_parallel_size)
    return tokens // split_ranks(args, config)


def receive_ahead(args: Any, config: MaplConfig) -> int:
    """How many payloads are received ahead, by the user's wish or by default."""
    virtual = args.virtual_pipeline_model_parallel_size is not None
    return payloads_ahead(config, backend=args.distributed_backend, virtual=virtual)


def _check_virtual_stages(stages: int, args: Any) -> None:
    flag = f"--mapl-virtual-stages {stages}"
    if args.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"{flag} cuts the model inside one process, but --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} cuts it already; leave one of them out"
        )
    cuts = {
        "--pipeline-model-parallel-layout": args.pipeline_model_parallel_layout,
        "--decoder-first-pipeline-num-layers": args.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": args.decoder_last_pipeline_num_layers,
        "--account-for-embedding-in-pipeline-split": args.account_for_embedding_in_pipeline_split,
        "--account-for-loss-in-pipeline-split": args.account_for_loss_in_pipeline_split,
    }
    for other, value in cuts.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{other} cannot be used with {flag}, which cuts the model evenly; leave one of "
                "them out"
            )
    if args.num_layers % stages:
        raise ValueError(
            f"{flag} does not divide --num-layers {args.num_layers}; choose a divisor of it"
        )
    if args.recompute_granularity == "full":
        raise ValueError(
            f"{flag} cannot be used with --recompute-granularity full: layers that run again would "
            "send again; leave it out, or use --recompute-granularity selective"
        )


def _check_geometry_interval(interval: int, own_log_interval: int | None, args: Any) -> None:
    """What is measured goes into a line of metrics, so there must be one."""
    flag, lines = "--mapl-log-interval", own_log_interval
    if lines is None:
        flag, lines = "--log-interval", args.log_interval
    if interval % lines:
        raise ValueError(
            f"--mapl-geometry-interval {interval} is no multiple of {flag} {lines}, the steps "
            f"between two lines of metrics; use {-(-interval // lines) * lines}, or give a "
            "--mapl-log-interval that divides it"
        )


def _check_receive_ahead(config: MaplConfig, args: Any) -> None:
    depth = config.receive_ahead
    if config.virtual_stages is not None:
        raise ValueError(
            f"--mapl-receive-ahead {depth} has no effect with --mapl-virtual-stages "
            f"{config.virtual_stages}, between which nothing is received; leave it out"
        )
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            f"--mapl-receive-ahead {depth} is for pipelines without virtual stages; leave it out: "
            "their schedule overlaps its transfers by itself"
        )
    if args.distributed_backend != "gloo":
        raise ValueError(
            f"--mapl-receive-ahead {depth} needs --distributed-backend gloo, not "
            f"{args.distributed_backend}, whose transfers occupy the GPU while they wait; leave it "
            "out"
        )


def mtp_before_last_stage(args: Any) -> bool:
    """Whether the layout puts multi-token prediction into another process than the loss."""
    if args.pipeline_model_parallel_layout is None or not args.mtp_num_layers:
        return False
    layout = pipeline_layout(args)
    return bool(layout.validate_layer_layout(args.num_layers, args.mtp_num_layers))


def _check_links(flag: str, values: Sequence[object], pipeline: int, virtual: int) -> None:
    """Boundaries that share a link between two processes must have payloads of one size."""
    if len(values) == 1:
        return
    for boundary, value in enumerate(values):
        if value != values[boundary % pipeline]:
            raise ValueError(
                f"{flag} {' '.join(map(str, values))} differs for boundaries "
                f"{boundary % pipeline} and {boundary}, but with --pipeline-model-parallel-size "
                f"{pipeline} and {virtual} virtual stages they share one link between two "
                "processes; give boundaries that are a pipeline apart the same"
            )


def check_same_on_all_ranks(args: Any) -> None:
    """Compares the `--mapl-*` settings of all processes, and MAPL_OPS where there are boundaries.

    To be called on every process.

    Raises:
        ValueError: names a process whose settings differ from those of rank 0, and both.
    """
    own = {name: value for name, value in sorted(vars(args).items()) if name.startswith(PREFIX)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (own, os.environ.get(OPS_VARIABLE) or None))
    first, first_ops = everyone[0]
    for rank, (other, ops) in enumerate(everyone):
        if other != first:
            raise ValueError(
                f"--mapl-* flags differ between processes: {_differences(first, other, rank)}; "
                "start all processes with the same flags"
            )
        if ops != first_ops and first["mapl_rank"] is not None:
            raise ValueError(
                f"{OPS_VARIABLE} is {_said(first_ops)} on rank 0 and {_said(ops)} on rank {rank}, "
                "but both sides of a boundary must round alike; set it to the same in the "
                "environment of all processes, or in none"
            )


def _differences(first: dict[str, Any], other: dict[str, Any], rank: int) -> str:
    """The settings in which a process differs from rank 0."""
    names = [name for name in first if first[name] != other[name]]
    if (first["mapl_rank"] is None) != (other["mapl_rank"] is None):
        names = ["mapl_rank"]  # without it all others are unset
    return "; ".join(
        f"--{name.replace('_', '-')} is {_said(first[name])} on rank 0 and "
        f"{_said(other[name])} on rank {rank}"
        for name in names
    )


def _said(value: Any) -> str:
    """A setting as it stands on a command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not set" if value is None else str(value)
