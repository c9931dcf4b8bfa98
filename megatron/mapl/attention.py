# SPDX-License-Identifier: Apache-2.0
"""Attention of the local layers through torch's `scaled_dot_product_attention`.

Megatron's own `DotProductAttention` writes the scores [b, heads, s, s] to memory, which is what
Transformer Engine is there to avoid. Without it, torch's kernels do: the same numbers up to
rounding, no s × s tensor forward or backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor


class TorchAttention(DotProductAttention):
    """softmax(Q Kᵀ · scale) V, causal or without a mask.

    What torch's kernels do not know goes the way of Megatron's own class: a mask that is given as a
    tensor, sliding windows, softmax with an offset, and scaling by layer.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self._fits = (
            self.attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            and self.scale_mask_softmax.window_size is None
            and config.softmax_type == "vanilla"
            and not config.apply_query_key_layer_scaling
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Megatron's arguments.

        Args:
            query: [s, b, heads, width].
            key, value: [s, b, groups, width]; each group serves heads/groups heads.

        Returns:
            [s, b, heads · width].
        """
        others = (attention_mask, attention_bias, packed_seq_params)
        square = len(query) == len(key) and query.size(-1) == value.size(-1)
        if not (self._fits and square and all(other is None for other in others)):
            own: Tensor = super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
            return own
        dropout = self.attention_dropout.p if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # Heads are spread over tensor-parallel ranks, which must draw different numbers.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self._attend(query, key, value, dropout)
        return self._attend(query, key, value, dropout)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=self.attn_mask_type is AttnMaskType.causal,
            scale=self.softmax_scale,
            enable_gqa=key.size(1) != query.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def wanted(args: Any) -> bool:
    """Whether the local layers shall use it: unless the user asks for Megatron's own way, or for
    masks that end at a document's end."""
    own = (AttnBackend.local, AttnBackend.unfused)
    return (
        args.transformer_impl == "local"
        and args.attention_backend not in own
        and not args.reset_attention_mask
    )


def core_attention(provider: Any) -> type[torch.nn.Module]:
    """In place of `LocalSpecProvider.core_attention`."""
    return TorchAttention
