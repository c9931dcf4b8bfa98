# SPDX-License-Identifier: Apache-2.0
"""Whether Megatron's arguments are those of a LLaMA, and what of them an export leaves out.

What a LLaMA has is checked, not assumed: an argument that would make the model another function is
refused by its name.
"""

import argparse
from typing import Any

from hf_errors import ConversionError

#: dest → the values that a LLaMA has, the flag that sets another.
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalization": (("RMSNorm",), "--normalization"),
    "layernorm_zero_centered_gamma": ((False,), "--apply-layernorm-1p"),
    "apply_layernorm_1p": ((False,), "--apply-layernorm-1p"),
    "apply_residual_connection_post_layernorm": (
        (False,),
        "--apply-residual-connection-post-layernorm",
    ),
    "position_embedding_type": (("rope",), "--position-embedding-type"),
    "rotary_percent": ((1.0,), "--rotary-percent"),
    "rotary_interleaved": ((False,), "--rotary-interleaved"),
    "rotary_seq_len_interpolation_factor": ((None,), "--rotary-seq-len-interpolation-factor"),
    "no_rope_freq": ((None,), "--no-rope-freq"),
    "swiglu": ((True,), "the activation (no --swiglu)"),
    "squared_relu": ((False,), "--squared-relu"),
    "quick_geglu": ((False,), "--quick-geglu"),
    "glu_linear_offset": ((0.0,), "--glu-linear-offset"),
    "activation_func_clamp_value": ((None,), "--activation-func-clamp-value"),
    "add_bias_linear": ((False,), "biases (no --disable-bias-linear)"),
    "add_qkv_bias": ((False,), "--add-qkv-bias"),
    "qk_layernorm": ((False,), "--qk-layernorm"),
    "qk_l2_norm": ((False,), "--qk-l2-norm"),
    "softmax_type": (("vanilla",), "--softmax-type"),
    "window_size": ((None,), "--window-size"),
    "attention_output_gate": ((False,), "--attention-output-gate"),
    "experimental_attention_variant": ((None,), "--experimental-attention-variant"),
    "multi_latent_attention": ((False,), "--multi-latent-attention"),
    "num_experts": ((None,), "--num-experts"),
    "mtp_num_layers": ((None, 0), "--mtp-num-layers"),
    "use_mup": ((False,), "--use-mup"),
    "spec": ((None,), "--spec"),
    "hybrid_layer_pattern": ((None,), "--hybrid-layer-pattern"),
    "heterogeneous_layers_config_path": ((None,), "--heterogeneous-layers-config-path"),
    "heterogeneous_layers_config_encoded_json": (
        (None,),
        "--heterogeneous-layers-config-encoded-json",
    ),
}


def check_llama(args: argparse.Namespace) -> None:
    """Refuses what is no LLaMA.

    Raises:
        ConversionError: names the argument and its value.
    """
    for dest, (allowed, flag) in _NEEDED.items():
        value = getattr(args, dest, allowed[0])
        if value not in allowed:
            if isinstance(value, list):
                value = " ".join(map(str, value))
            shown = flag if isinstance(value, bool) or " " in flag else f"{flag} {value}"
            raise ConversionError(
                f"the model was trained with {shown}, which no LLaMA has: it cannot be converted"
            )


def rounding_notes(args: argparse.Namespace) -> list[str]:
    """What makes an exact export equal to less than rounding of the weights' type."""
    return [
        f"trained with --{kind}-format {value}: its GEMMs rounded to {kind}, the export's do not, "
        f"so it is the trained function but for the rounding of {kind}"
        for kind in ("fp8", "fp4")
        if (value := getattr(args, kind, None))
    ]


def sample_notes(args: argparse.Namespace) -> list[str]:
    """What the run did at the ends of documents, which measuring a loss does not."""
    found = [
        "--" + dest.replace("_", "-")
        for dest in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
        if getattr(args, dest, False)
    ]
    if not found:
        return []
    return [
        f"trained with {' '.join(found)}, which the losses here do not follow: a sample is read "
        "through the ends of documents, and all of its tokens count"
    ]
