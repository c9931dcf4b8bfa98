# SPDX-License-Identifier: Apache-2.0
"""The training script of `pretrain_gpt.py`: micro-batches, the loss, the datasets.

A script for Megatron like any other, with nothing of boundaries in it. As any other it is to be
imported by `session.run` or later: it takes Megatron's `pretrain` as it finds it.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (
    get_args,
    get_timers,
    get_tokenizer,
    inprocess_restart,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron.mapl.errors import exit_with_error
from megatron.mapl.layout import pipeline_layout

#: What the model and the loss take of a micro-batch, in the order of `get_batch`.
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

#: A loss that exceeds the largest one seen by this factor is reported as a spike.
SPIKY_LOSS_FACTOR = 10


def _computes_mtp(args: Any, vp_stage: int | None) -> bool:
    """Whether this stage holds multi-token prediction layers, which need tokens and labels."""
    return bool(
        mtp_on_this_rank(
            layout=pipeline_layout(args),
            mtp_num_layers=args.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def _reads_data(vp_stage: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or _computes_mtp(get_args(), vp_stage)


def get_batch(data_iterator: Iterator[dict[str, Any]], vp_stage: int | None) -> list[Any]:
    """The next micro-batch as `BATCH_KEYS`; None for what this stage does not need.

    Tensors are [b, s], with s cut to this rank's share under context parallelism.
    """
    args = get_args()
    if not _reads_data(vp_stage):
        return [None] * len(BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        for key, value in next(data_iterator).items():
            batch[key] = value.cuda(non_blocking=True) if torch.is_tensor(value) else value
        for key in (*BATCH_KEYS, "cu_seqlens"):
            batch.setdefault(key, None)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_computes_mtp(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    return [batch[key] for key in BATCH_KEYS]


def _validate_loss(loss: torch.Tensor) -> None:
    """Megatron's checks of the loss (`--check-for-...`), on each rank before any reduction."""
    args = get_args()
    machine = get_rerun_state_machine()
    checks: list[tuple[Any, str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "found NaN in local forward loss calculation", True))
        checks.append((torch.isinf, "found Inf in local forward loss calculation", True))
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        checks.append((spiky, "Spiky loss", False))
    for rejects, message, fatal in checks:
        # The forward pass is deterministic: a second computation must give the same loss.
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal
        )


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Masked sum of the token losses.

    Args:
        loss_mask: [b, s], 1 for tokens that count.
        output: [b, s] token losses in nats.

    Returns:
        The summed loss, the number of tokens that count, and both as the report of the step.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    _validate_loss(loss)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch through this stage: the output and what turns it into a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
        data_iterator, get_attr_wrapped_model(model, "vp_stage")
    )
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    settings = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**settings)
    return GPTFIMDatasetConfig(
        **settings,
        fim_rate=args.fim_rate,
        fim_spm_rate=args.fim_spm_rate,
        fim_split_sample=args.fim_split_sample,
        fim_fragment_rate=args.fim_fragment_rate,
        fim_no_prefix=args.fim_no_prefix,
        fim_extra_tokens={
            name: getattr(args, f"fim_{name}_token")
            for name in ("prefix", "middle", "suffix", "pad", "eod")
        },
    )


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The train, validation and test datasets, built where they are read.

    Args:
        num_samples: how many samples each of the three shall give.
        vp_stage: the virtual stage that reads them.
    """
    args = get_args()
    dataset = GPTFIMDataset if args.fim_data else GPTDataset
    if args.mock_data:
        dataset = MockGPTDataset

    def is_built_on_rank() -> bool:
        return _reads_data(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0

    print_rank_0("> building train, validation, and test datasets for GPT ...")
    datasets = BlendedMegatronDatasetBuilder(
        dataset, num_samples, is_built_on_rank, _dataset_config(args)
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return tuple(datasets)


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # each rank builds its own


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold a word embedding, whose gradients Megatron keeps in step."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def check_arguments(args: Any) -> None:
    """Refuses Megatron features that `pretrain_gpt.py` does not drive.

    Raises:
        ValueError: naming the flag and what to use instead.
    """
    for dest, flag in (
        ("sft", "--sft"),
        ("dataloader_inter_document_masking", "--dataloader-inter-document-masking"),
        ("hybrid_context_parallel", "--hybrid-context-parallel"),
        ("perform_rl_step", "--perform-rl-step"),
        ("hybrid_layer_pattern", "--hybrid-layer-pattern"),
    ):
        if getattr(args, dest, None):
            raise ValueError(
                f"{flag} is not supported here: pretrain_gpt.py trains GPT models on unpacked "
                "sequences; leave the flag out, or use Megatron-LM's own script for it"
            )


def train(*, program_start: float) -> None:
    """Runs the job that the command line describes, to its end.

    Args:
        program_start: when the process started, for Megatron's timing report.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    try:
        check_arguments(args)
    except ValueError as error:
        exit_with_error(error)
    restarting_pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    restarting_pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
        get_embedding_ranks=get_embedding_ranks,
    )
