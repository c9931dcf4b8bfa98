# SPDX-License-Identifier: Apache-2.0
"""What the `--mapl-*` flags in Megatron's namespace ask for."""

from dataclasses import replace as replace_fields
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size

from mapl.anchors import default_buckets
from mapl.plan import plan_boundaries
from mapl.token_ids import id_size
from megatron.mapl import arguments
from megatron.mapl.runtime import MaplRuntime


def from_args(args: Any) -> MaplRuntime | None:
    """What the boundaries need, or None for plain Megatron.

    Raises:
        ValueError: bad input; the message names the flag, its value and the remedy.
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
        pipeline_dtype=args.params_dtype,
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
