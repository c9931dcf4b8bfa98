# SPDX-License-Identifier: Apache-2.0
"""A LLaMA with the compressed boundaries that it was trained through.

Between the layers where the pipeline was cut, activations pass a projector, token anchors and a
codec (arXiv 2606.05484): they are part of the function that was trained. Everything else is
`LlamaForCausalLM`. Made by MAPL for Megatron's tools/convert_to_hf.py.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from .boundary_mapl_llama import MaplAnchor, MaplBoundary

# Not needed here, but transformers 4 fetches only those files that this one imports.
from .codecs_mapl_llama import build_codec  # noqa: F401
from .configuration_mapl_llama import MaplLlamaConfig


class MaplLlamaDecoderLayer(LlamaDecoderLayer):
    """A layer, and the boundary before it if there is one."""

    def __init__(self, config: MaplLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        layers = [boundary["layer"] for boundary in config.mapl_boundaries or []]
        self.boundary: MaplBoundary | None = None
        if layer_idx in layers:
            self.boundary = MaplBoundary(config, layers.index(layer_idx))

    def forward(
        self, hidden_states: Tensor, *args: Any, mapl_anchors: dict[int, Tensor], **kwargs: Any
    ) -> Tensor:
        if self.boundary is not None:
            hidden_states = self.boundary(hidden_states, mapl_anchors)
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        return output


class MaplLlamaModel(LlamaModel):
    """The decoder. `predecessors` [b, s] are the ids before `input_ids`, −1 where there is none.

    Bigram anchors need them. Without a cache they are found in `input_ids`: a sequence begins at
    position 0 and behind masked tokens. With a cache the caller must give them, as `generate` does.
    """

    config_class = MaplLlamaConfig
    _no_split_modules: ClassVar[list[str]] = ["MaplLlamaDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": MaplLlamaDecoderLayer,
        "attentions": LlamaAttention,
    }

    def __init__(self, config: MaplLlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            MaplLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.anchors = nn.ModuleList(MaplAnchor(config) for _ in range(config.mapl_stages))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        predecessors: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        anchors: dict[int, Tensor] = {}
        if len(self.anchors):
            if input_ids is None:
                raise ValueError("the boundaries' anchors are found by token: give input_ids")
            if self.config.mapl_anchor == "bigram" and predecessors is None:
                if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
                    raise ValueError(
                        "the boundaries need the token before the first of input_ids, which is in "
                        "the cache no more: give predecessors [b, s], the ids one place earlier"
                    )
                predecessors = predecessors_of(input_ids, attention_mask, position_ids)
            anchors = {n: anchor(input_ids, predecessors) for n, anchor in enumerate(self.anchors)}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mapl_anchors=anchors,
            **kwargs,
        )


class MaplLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` over `MaplLlamaModel`; takes `predecessors` too."""

    config_class = MaplLlamaConfig
    _no_split_modules: ClassVar[list[str]] = ["MaplLlamaDecoderLayer"]

    def __init__(self, config: MaplLlamaConfig) -> None:
        super().__init__(config)
        self.model = MaplLlamaModel(config)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds the predecessors of the new tokens, which `input_ids` still has."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        new = inputs.get("input_ids")
        if self.config.mapl_anchor != "bigram" or new is None:
            return inputs
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if past + new.shape[1] != input_ids.shape[1]:
            raise ValueError(
                f"{past} tokens are in the cache and {new.shape[1]} are new, but input_ids has "
                f"{input_ids.shape[1]}: the boundaries need the token before each. Give generate "
                "all tokens from the start on, and no prefill_chunk_size"
            )
        before = predecessors_of(input_ids, attention_mask, None)
        inputs["predecessors"] = before[:, past:].contiguous()
        return inputs


def predecessors_of(
    ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """The ids one place earlier [b, s]; −1 where a sequence begins.

    Args:
        ids: [b, s].
        attention_mask: [b, s], 0 at padding; masks of other shapes say nothing of padding.
        position_ids: [b, s] or [1, s]; 0 where a sequence begins, as in packed batches.
    """
    before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], 1)
    if attention_mask is not None and attention_mask.shape == ids.shape:
        hidden = torch.cat([attention_mask[:, :1], attention_mask[:, :-1]], 1) == 0
        before = before.masked_fill(hidden, -1)
    if position_ids is not None:
        before = before.masked_fill(position_ids == 0, -1)
    return before


__all__ = ["MaplLlamaForCausalLM", "MaplLlamaModel"]
