# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM with nothing of MAPL in its way: the other side of the identity tests.

A training script as Megatron's users write it, around its own `pretrain`: its model builder, its
schedules, its optimizer. It shares with `pretrain_gpt.py` only CPU mode and the mends of upstream
faults, without which Megatron does not run here at all.
"""

from functools import partial
from typing import Any


def run() -> None:
    """Trains with the arguments in sys.argv."""
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.enums import ModelType
    from megatron.training import get_args, get_tokenizer, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.utils import get_ltor_masks_and_position_ids

    from megatron.mapl import cpu, upstream
    from megatron.mapl.gpt import get_embedding_ranks
    from megatron.mapl.transfers import leave_together

    cpu.patch_megatron()
    upstream.install()

    def set_defaults(parser: Any) -> Any:
        parser.set_defaults(**cpu.ARGUMENT_DEFAULTS)
        return parser

    args = parse_and_validate_args(extra_args_provider=set_defaults)

    def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            split=args.split,
            tokenizer=get_tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=True,
        )
        # Every process reads all data: no broadcast, no stage without a batch.
        return BlendedMegatronDatasetBuilder(
            MockGPTDataset, num_samples, lambda: True, config
        ).build()

    datasets.is_distributed = True  # type: ignore[attr-defined]

    def loss_func(mask: torch.Tensor, output: torch.Tensor) -> Any:
        total = torch.sum(output.float().view(-1) * mask.view(-1))
        count = mask.sum().to(torch.int)
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        tokens, labels = batch["tokens"], batch["labels"]
        eod = get_tokenizer().eod
        mask, loss_mask, positions = get_ltor_masks_and_position_ids(
            tokens, eod, eod, False, False, False, False
        )
        output = model(tokens, positions, mask, labels=labels, loss_mask=loss_mask)
        return output, partial(loss_func, loss_mask)

    assert mpu and get_args
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=get_embedding_ranks,
    )
    leave_together()
