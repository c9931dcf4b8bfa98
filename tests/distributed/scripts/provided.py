# SPDX-License-Identifier: Apache-2.0
"""A training script as Megatron's users wrote it up to 0.18: a function builds the model.

Written for Megatron alone, 0.18 and 0.19: nothing here knows of boundaries. It has a flag of its
own, which names something that a script may do and boundaries do not go with.
"""

import sys
from functools import partial
from typing import Any

import megatron.core
import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, initialize_megatron, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from script_parts import datasets, forward_step, model_provider

HABITS = (
    "another-model",
    "early-import",
    "exit-without-training",
    "more-tokens",
    "own-communicator",
    "own-gradients",
    "own-loop",
    "own-parser",
    "own-provider-fails",
    "no-training",
)


def add_flag(parser: Any) -> Any:
    """The script's own."""
    parser.add_argument("--habit", choices=HABITS)
    if "own-provider-fails" in sys.argv:
        raise ValueError("a fault of the script's own")
    return parser


class AnotherModel(torch.nn.Module):
    """No GPTModel."""


def build_another_model(**kwargs: Any) -> torch.nn.Module:
    """Whatever Megatron asks for."""
    return AnotherModel()


def build_with_own_gradients(**kwargs: Any) -> torch.nn.Module:
    """A GPT that says itself how gradients are reduced."""
    model = model_provider(**kwargs)
    model.config.finalize_model_grads_func = print
    return model


def main() -> None:
    """Trains, unless its habit is another."""
    print(f"Megatron {megatron.core.__version__}")
    if "own-parser" in sys.argv:
        args = parse_args(add_flag)
        validate_args(args)
        set_global_variables(args)
    else:
        args = parse_and_validate_args(extra_args_provider=add_flag)
    if args.habit == "own-loop":
        initialize_megatron()
    if args.habit == "exit-without-training":
        sys.exit(0)
    if args.habit in ("own-loop", "no-training"):
        return
    assert get_args() is args
    provider = {
        "another-model": build_another_model,
        "own-gradients": build_with_own_gradients,
        "more-tokens": partial(model_provider, 128),
    }.get(args.habit, model_provider)
    train = pretrain
    if args.habit == "early-import":
        train = pretrain.__wrapped__  # what it would have been
    more = {"p2p_communicator": object()} if args.habit == "own-communicator" else {}
    train(
        cfg_container=pretrain_cfg_container_from_args(args),
        train_valid_test_dataset_provider=datasets,
        model_provider=provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **more,
    )


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
