# SPDX-License-Identifier: Apache-2.0
"""Named settings that stand in for what is left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mapl.config import LEARNED

#: arXiv 2606.05484: bf16 latents both ways, factorised anchors of the projector's rank. What it
#: exchanges the projector's gradient in it does not say: not less than was computed.
_PAPER = {
    "anchor": "factorized",
    "projector": "learned",
    "forward_codec": ["pipeline"],
    "backward_codec": ["pipeline"],
}


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """Which settings stand in for flags that are left out."""

    preset: Literal["paper"] | None = None
    """paper: as in arXiv 2606.05484, --mapl-anchor factorized with --mapl-anchor-rank equal to
    --mapl-rank, latents and gradients in the model's dtype, the projector's gradient in fp32. Flags
    that are given come first.
    Default: the default of each flag (docs/search.md has what they come from)."""


def with_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `mapl.config.MaplConfig`, completed by a preset.

    Args:
        preset: paper, or None for no change.
        given: what the user has set, `rank` among it.

    Raises:
        ValueError: ranks that differ, of which the preset needs one.
    """
    if preset is None:
        return dict(given)
    settings = {**_PAPER, **given}
    if settings["projector"] in LEARNED:
        settings.setdefault("projector_exchange", "fp32")
    if settings["anchor"] in ("factorized", "bigram") and "anchor_rank" not in given:
        ranks = {*given["rank"]} - {0}
        if len(ranks) > 1:
            raise ValueError(
                f"--mapl-preset paper takes the anchor's rank from --mapl-rank, which is "
                f"{' '.join(map(str, given['rank']))}; give --mapl-anchor-rank too, or one rank"
            )
        settings["anchor_rank"] = max(given["rank"])
    return settings
