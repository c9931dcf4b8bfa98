# SPDX-License-Identifier: Apache-2.0
"""Megatron's arguments ↔ the configuration of a LLaMA in transformers.

That Megatron's are those of a LLaMA is `hf_check`'s to say.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hf_errors import ConversionError

#: Llama 3's rotary scaling, as Megatron's --use-rope-scaling has it; the factor is a flag.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama_settings(args: argparse.Namespace, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a `LlamaConfig`.

    Args:
        args: Megatron's, as `hf_check.check_llama` takes them.
        vocab_size: tokens without padding.
        dtype: of the weights.
    """
    grouped = getattr(args, "group_query_attention", False)
    epsilon = getattr(args, "layernorm_epsilon", None) or getattr(args, "norm_epsilon", 1e-5)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        rope |= {"rope_type": "llama3", "factor": float(args.rope_scaling_factor), **_LLAMA3}
    return {
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if grouped else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings or args.seq_length,
        "initializer_range": args.init_method_std,
        "rms_norm_eps": epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
    }


def save_config(config: Any, folder: Path) -> None:
    """Writes config.json.

    transformers 5 writes `rope_parameters` and `dtype` alone, of which 4.x and other tools know
    nothing: they would take the default base. So their names stand there too.
    """
    config.save_pretrained(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    rope = dict(content["rope_parameters"])
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    content["torch_dtype"] = content["dtype"]
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def megatron_arguments(config: Any, sequence_length: int) -> dict[str, Any]:
    """Megatron's arguments (dest → value) of a `LlamaConfig`.

    Raises:
        ConversionError: names what Megatron's GPT model cannot do.
    """
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    scaled = kind == "llama3" and {key: rope.get(key) for key in _LLAMA3} == _LLAMA3
    rotates_all = rope.get("partial_rotary_factor", 1.0) == 1.0
    for name, value, fits in (
        ("model_type", config.model_type, config.model_type == "llama"),
        ("hidden_act", config.hidden_act, config.hidden_act in ("silu", "swish")),
        ("attention_bias", config.attention_bias, not config.attention_bias),
        ("mlp_bias", config.mlp_bias, not config.mlp_bias),
        ("rope_parameters", rope, rotates_all and (kind == "default" or scaled)),
    ):
        if not fits:
            raise ConversionError(
                f"config.json has {name} {value}, for which Megatron's LLaMA has no flag: it "
                "cannot be converted"
            )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    settings = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.head_dim,
        "seq_length": sequence_length,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole(rope["rope_theta"]),
        "rotary_percent": 1.0,
        "use_rope_scaling": scaled,
        "rope_scaling_factor": rope.get("factor", 8.0),
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "init_method_std": config.initializer_range,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "add_position_embedding": True,
    }
    return settings


def _whole(value: float) -> float | int:
    """Megatron's --rotary-base is a whole number."""
    if value != int(value):
        raise ConversionError(
            f"config.json has rope_theta {value}; Megatron's --rotary-base is a whole number"
        )
    return int(value)


#: Flags without a value: dest → the flag, given where the argument has this value.
_SWITCHES = {
    "group_query_attention": ("--group-query-attention", True),
    "use_rope_scaling": ("--use-rope-scaling", True),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--disable-bias-linear", False),
    "untie_embeddings_and_output_weights": ("--untie-embeddings-and-output-weights", True),
}
_UNSAID = {"add_position_embedding", "rotary_percent"}


def flags(settings: dict[str, Any]) -> list[str]:
    """Megatron's command line for arguments that `megatron_arguments` gave."""
    words: list[str] = []
    without = set(_UNSAID)
    if not settings["group_query_attention"]:
        without.add("num_query_groups")
    if not settings["use_rope_scaling"]:
        without.add("rope_scaling_factor")
    for dest, value in settings.items():
        if dest in _SWITCHES:
            flag, given = _SWITCHES[dest]
            words += [flag] if value is given else []
        elif dest not in without:
            name = "norm-epsilon" if dest == "layernorm_epsilon" else dest.replace("_", "-")
            words += [f"--{name}", str(value)]
    return words
