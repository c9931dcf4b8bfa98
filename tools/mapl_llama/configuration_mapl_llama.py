# SPDX-License-Identifier: Apache-2.0
"""Configuration of a LLaMA with compressed boundaries between its pipeline stages."""

from typing import Any

from transformers import LlamaConfig


class MaplLlamaConfig(LlamaConfig):
    """A `LlamaConfig`, and what stands at the cuts.

    Attributes:
        mapl_boundaries: one entry for each compressed boundary, in order: `layer` (it stands
            before this one, counted from 0), `rank` r (numbers a token), `codec`, and the numbers
            `sender` and `receiver` of the anchors that are taken off and added back.
        mapl_stages: how many anchors there are: one for each stage at a compressed boundary.
        mapl_anchor: none, static, full, factorized or bigram.
        mapl_anchor_rank: k, columns of the anchors' tables.
        mapl_anchor_buckets: m, rows of the second table of bigram anchors.
        mapl_projector: whether latents are projections, and not the activations themselves.
        mapl_codec: sizes of the codecs: `group_size`, `topk`, `rvq_rounds`, `rvq_codes`; a boundary
            with `rvq` has its own `rvq_groups`.
    """

    model_type = "mapl_llama"

    mapl_boundaries: list[dict[str, Any]] | None = None
    mapl_stages: int = 0
    mapl_anchor: str = "none"
    mapl_anchor_rank: int = 0
    mapl_anchor_buckets: int = 0
    mapl_projector: bool = True
    mapl_codec: dict[str, Any] | None = None


__all__ = ["MaplLlamaConfig"]
