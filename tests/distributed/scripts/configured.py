# SPDX-License-Identifier: Apache-2.0
"""A training script as Megatron-LM's own are since 0.19: a configuration names the model.

Written for Megatron alone: nothing here knows of boundaries.
"""

import time

START = time.time()

import megatron.core  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import (  # noqa: E402
    inprocess_restart,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from script_parts import datasets, forward_step  # noqa: E402


def first_rank_alone(ranks: list[int]) -> list[int]:
    """Of a pipeline whose embeddings are not tied."""
    return ranks[:1]


if __name__ == "__main__":
    set_startup_timestamps(program_start=START, main_entry=time.time())
    print_rank_0(f"Megatron of {megatron.core.__file__}")
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(
        config,
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
        get_embedding_ranks=first_rank_alone,
    )
    print_rank_0("the script goes on after training")
