# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this directory have in common, beside them as in a checkout of Megatron-LM.

Written for Megatron alone: nothing here knows of boundaries.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, get_tokenizer
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage


def get_batch(iterator: Any, vp_stage: int | None) -> list[Any]:
    """Nothing for the stages in the middle, which see no tokens."""
    keys = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(keys)
    batch = next(iterator)
    return [batch[key].cuda(non_blocking=True) for key in keys]


def loss_func(mask: torch.Tensor, output: torch.Tensor) -> Any:
    """Megatron's three: the sum, the tokens in it, and both to report."""
    total = torch.sum(output.view(-1).float() * mask.view(-1).float())
    count = mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(iterator: Any, model: Any) -> Any:
    """One micro-batch through one chunk."""
    chunk = model
    while not hasattr(chunk, "vp_stage"):
        chunk = chunk.module
    tokens, labels, loss_mask, attention_mask, positions = get_batch(iterator, chunk.vp_stage)
    output = model(tokens, positions, attention_mask, labels=labels)
    return output, partial(loss_func, loss_mask)


def datasets(num_samples: Any, vp_stage: int | None = None) -> Any:
    """Mock data, where it is read."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset, num_samples, lambda: is_first_or_last_pipeline_stage(vp_stage), config
    ).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def model_provider(
    more_tokens: int = 0,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The GPT of Megatron's flags, with more tokens in its vocabulary than these say."""
    args = get_args()
    assert mpu.is_initialized()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size + more_tokens,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
