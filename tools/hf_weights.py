# SPDX-License-Identifier: Apache-2.0
"""LLaMA's weights in Megatron's names and in Hugging Face's.

Megatron stacks the layers along dimension 0 (or names each, in some versions). It fuses query, key
and value, group by group: [groups, q…q k v, head size] rows; and the MLP's gate above its up
projection. Both turn half of a head's channels against the other half in rotary embeddings, so no
rows change places. A vocabulary may be padded.

Shapes: d hidden size, h heads, g groups of them (g = h without grouped queries), c channels a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_checkpoint import MegatronCheckpoint
from hf_errors import ConversionError
from hf_output import Weight

EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
_HF_EMBEDDING, _HF_NORM, _HF_OUTPUT = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"

#: Weights of a layer that are the same in both: Megatron's name → Hugging Face's.
_SAME = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
#: Weights of a layer that Megatron keeps in one.
_QKV_PARTS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_FC1_PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

#: Modules of a layer that have an extra state in Megatron's checkpoints.
EXTRA_STATES = tuple(
    f"decoder.layers.{name}"
    for name in (
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)


def split_qkv(qkv: Tensor, groups: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [h c, d], key and value [g c, d] of [(h + 2 g) c, d]."""
    each = qkv.view(groups, -1, channels, qkv.shape[-1])
    parts = each.split([each.shape[1] - 2, 1, 1], dim=1)
    query, key, value = (part.reshape(-1, qkv.shape[-1]) for part in parts)
    return query, key, value


def join_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int, channels: int) -> Tensor:
    """The inverse of `split_qkv`."""
    parts = [part.view(groups, -1, channels, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(parts, 1).reshape(-1, query.shape[-1])


def to_hugging_face(
    checkpoint: MegatronCheckpoint, config: Any, table: str | None = None
) -> dict[str, Weight]:
    """The weights of a `LlamaForCausalLM` with this configuration.

    Args:
        checkpoint: of Megatron.
        config: a `LlamaConfig`; its vocabulary may be smaller than the padded one.
        table: key of a frozen table [V, d] that was added to the embedding, if there was one.

    Raises:
        ConversionError: the checkpoint has other weights.
    """
    used: set[str] = set()
    weights: dict[str, Weight] = {}

    def rows(key: str, name: str, plus: str | None = None) -> None:
        def load() -> Tensor:
            whole = checkpoint.read(key)
            if plus is not None:
                whole += checkpoint.read(plus)
            return whole[: config.vocab_size]

        _expect(checkpoint, key)
        used.add(key)
        weights[name] = Weight((config.vocab_size, config.hidden_size), checkpoint.dtype(key), load)

    rows(EMBEDDING, _HF_EMBEDDING, table)
    for layer in range(config.num_hidden_layers):
        for suffix, name, load, shape in _layer(config):
            key, index = _layer_key(checkpoint, suffix, layer)
            used.add(key)
            weights[f"model.layers.{layer}.{name}"] = Weight(
                shape, checkpoint.dtype(key), partial(_part, checkpoint, key, index, load)
            )
    _expect(checkpoint, FINAL_NORM)
    used.add(FINAL_NORM)
    weights[_HF_NORM] = Weight(
        (config.hidden_size,), checkpoint.dtype(FINAL_NORM), partial(checkpoint.read, FINAL_NORM)
    )
    if not config.tie_word_embeddings:
        rows(OUTPUT, _HF_OUTPUT)
    ours = ("mapl.", "optimizer.", "chained_")
    others = {key for key in checkpoint.tensors if not key.startswith(ours)} - used
    if others:
        raise ConversionError(
            f"--load {checkpoint.folder} holds {', '.join(sorted(others)[:3])}, which no LLaMA has"
        )
    return weights


def to_megatron(
    read: Callable[[str, tuple[int, ...]], Tensor], config: Any
) -> dict[str, Tensor | list[Tensor]]:
    """Megatron's weights, those of layers as lists, of a `LlamaForCausalLM`.

    Args:
        read: gives the weight of a name, which is to have this shape.
        config: its `LlamaConfig`.
    """
    shapes = {name: shape for _, name, _, shape in _layer(config)}
    vocabulary = (config.vocab_size, config.hidden_size)
    groups, channels = config.num_key_value_heads, config.head_dim

    def qkv(layer: int) -> Tensor:
        query, key, value = (same(name, layer) for name in _QKV_PARTS)
        return join_qkv(query, key, value, groups, channels)

    def fc1(layer: int) -> Tensor:
        return torch.cat([same(name, layer) for name in _FC1_PARTS])

    def same(name: str, layer: int) -> Tensor:
        return read(f"model.layers.{layer}.{name}", shapes[name])

    builders: dict[str, Callable[[int], Tensor]] = {_QKV: qkv, _FC1: fc1}
    builders |= {suffix: partial(same, name) for suffix, name in _SAME.items()}
    tensors: dict[str, Tensor | list[Tensor]] = {
        EMBEDDING: read(_HF_EMBEDDING, vocabulary),
        FINAL_NORM: read(_HF_NORM, (config.hidden_size,)),
    }
    for suffix, build in builders.items():
        tensors[f"decoder.layers.{suffix}"] = [
            build(layer) for layer in range(config.num_hidden_layers)
        ]
    if not config.tie_word_embeddings:
        tensors[OUTPUT] = read(_HF_OUTPUT, vocabulary)
    return tensors


def _layer(config: Any) -> list[tuple[str, str, Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Megatron's name, Hugging Face's, how one comes from the other, the latter's shape."""
    d, inner, channels = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    same_shapes = ((d,), (d, heads * channels), (d,), (d, inner))
    found: list[Any] = [
        (suffix, name, lambda whole: whole, shape)
        for (suffix, name), shape in zip(_SAME.items(), same_shapes, strict=True)
    ]
    for number, name in enumerate(_QKV_PARTS):
        shape = ((groups if number else heads) * channels, d)
        found.append((_QKV, name, partial(_nth_of_qkv, number, groups, channels), shape))
    for number, name in enumerate(_FC1_PARTS):
        found.append((_FC1, name, partial(_nth_half, number), (inner, d)))
    return found


def _nth_of_qkv(number: int, groups: int, channels: int, qkv: Tensor) -> Tensor:
    return split_qkv(qkv, groups, channels)[number]


def _nth_half(number: int, whole: Tensor) -> Tensor:
    return whole.chunk(2)[number]


def _part(
    checkpoint: MegatronCheckpoint, key: str, index: int | None, take: Callable[[Tensor], Tensor]
) -> Tensor:
    return take(checkpoint.read(key, index))


def _layer_key(checkpoint: MegatronCheckpoint, suffix: str, layer: int) -> tuple[str, int | None]:
    """Where a layer's weight is: in a stack of all layers, or by itself."""
    single = f"decoder.layers.{layer}.{suffix}"
    if single in checkpoint.tensors:
        return single, None
    stacked = f"decoder.layers.{suffix}"
    _expect(checkpoint, stacked)
    return stacked, layer


def _expect(checkpoint: MegatronCheckpoint, key: str) -> None:
    if key not in checkpoint.tensors:
        raise ConversionError(
            f"--load {checkpoint.folder} has no {key}, which every LLaMA has; was it saved by "
            "pretrain_gpt.py?"
        )
