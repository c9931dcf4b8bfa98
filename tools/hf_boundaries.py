# SPDX-License-Identifier: Apache-2.0
"""The boundaries in a checkpoint, as weights and settings of tools/mapl_llama."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_checkpoint import MegatronCheckpoint
from hf_errors import ConversionError
from hf_output import Weight
from mapl.codecs import default_rvq_groups
from mapl.config import MaplConfig
from mapl.operands import Operands
from mapl.plan import BoundaryPlan, plan_boundaries

_PREFIX = "mapl_"


@dataclass(frozen=True)
class Boundaries:
    """Those of one checkpoint.

    Attributes:
        config, plan: its settings, settled for the model.
        cuts: how many layers stand before each boundary.
        stages: the layers (first, last) of each stage.
    """

    checkpoint: MegatronCheckpoint
    config: MaplConfig
    plan: BoundaryPlan
    cuts: list[int]
    stages: list[tuple[int, int]]

    @property
    def compressed(self) -> list[int]:
        """The numbers of the boundaries that do something."""
        return [number for number, rank in enumerate(self.plan.ranks) if rank]

    @property
    def anchored(self) -> list[int]:
        """The stages whose anchors are exported: those at a compressed boundary."""
        if self.config.anchor == "none":
            return []
        if self.shared_anchor:
            return [0]
        return sorted({stage for number in self.compressed for stage in (number, number + 1)})

    @property
    def shared_anchor(self) -> bool:
        """Whether all stages have one anchor: a frozen table is drawn alike on each."""
        return self.config.anchor == "static"

    @property
    def embedding_table(self) -> str | None:
        """The key of the table that Subspace Networks add to the embedding."""
        return self._stage_key(0, "table") if self.config.projector == "subspace" else None

    def settings(self) -> dict[str, Any]:
        """The `mapl_` fields of a `MaplLlamaConfig`."""
        codecs, has_anchor = self.config.codec_settings, self.config.anchor != "none"
        anchored = self.anchored
        place = {stage: index for index, stage in enumerate(anchored)}
        entries = []
        for number in self.compressed:
            entry = {
                "layer": self.cuts[number],
                "rank": self.plan.width(number),
                "codec": self.plan.forward_codecs[number],
                "sender": place.get(number, 0),
                "receiver": place.get(number + 1, 0),
            }
            if entry["codec"] == "rvq":
                width = self.plan.width(number)
                entry["rvq_groups"] = codecs.rvq_groups or default_rvq_groups(width)
            entries.append(entry)
        buckets = 0
        if self.config.anchor == "bigram":
            buckets = self.checkpoint.shape(self._stage_key(0, "B"))[0]
        return {
            "mapl_boundaries": entries,
            "mapl_stages": len(anchored),
            "mapl_anchor": self.config.anchor,
            "mapl_anchor_rank": self._anchor_width() if has_anchor else 0,
            "mapl_anchor_buckets": buckets,
            "mapl_projector": self.config.projector != "none",
            "mapl_codec": {
                "group_size": codecs.group_size,
                "topk": codecs.topk,
                "rvq_rounds": codecs.rvq_rounds,
                "rvq_codes": codecs.rvq_codes,
            },
        }

    def weights(self, vocab_size: int, dtype: torch.dtype) -> dict[str, Weight]:
        """The weights of anchors and boundaries, in the model's dtype.

        Raises:
            ConversionError: the checkpoint lacks one.
        """
        found: dict[str, Weight] = {}

        def add(name: str, shape: tuple[int, ...], load: Callable[[], Tensor]) -> None:
            found[name] = Weight(shape, dtype, load)

        settings = self.settings()
        width = settings["mapl_anchor_rank"]
        table = "table" if self.config.anchor == "static" else "E"
        for index, stage in enumerate(self.anchored):
            name, key = f"model.anchors.{index}", self._stage_key(stage, table)
            add(f"{name}.tokens", (vocab_size, width), partial(self._rows, key, vocab_size))
            if self.config.anchor == "bigram":
                key = self._stage_key(stage, "B")
                rows = settings["mapl_anchor_buckets"]
                add(f"{name}.bigrams", (rows, width), partial(self._rows, key, rows))
        for number, entry in zip(self.compressed, settings["mapl_boundaries"], strict=True):
            name, r, d = f"model.layers.{entry['layer']}.boundary", entry["rank"], self._hidden
            k = width if self._has_basis else 0
            if self.config.projector != "none":
                form = partial(self._operand, number, dtype)
                add(f"{name}.encoder", (d + k, r), partial(form, "encode"))
                add(f"{name}.decoder", (r + k, d), partial(form, "decode"))
            if entry["codec"] == "rvq":
                key = self._expect(f"mapl.cut_{entry['layer']}.forward_codec.codebook")
                load = partial(self.checkpoint.read, key)
                add(f"{name}.codec.codebook", self.checkpoint.shape(key), load)
        return found

    @property
    def _hidden(self) -> int:
        return self.plan.hidden_size

    @property
    def _has_basis(self) -> bool:
        return self.config.anchor in ("factorized", "bigram")

    def _anchor_width(self) -> int:
        return self.plan.anchor_rank if self._has_basis else self._hidden

    def _stage_key(self, stage: int, name: str) -> str:
        first, last = self.stages[stage]
        return self._expect(f"mapl.stage_{first}_{last}.{name}")

    def _expect(self, key: str) -> str:
        if key not in self.checkpoint.tensors:
            raise ConversionError(
                f"--load {self.checkpoint.folder} has no {key}, which its boundaries need; was it "
                "saved by this version of MAPL?"
            )
        return key

    def _rows(self, key: str, count: int) -> Tensor:
        return self.checkpoint.read(key)[:count]

    def _operand(self, number: int, dtype: torch.dtype, direction: Any) -> Tensor:
        """[A ; −P A] of the sending stage or [Aᵀ ; P] of the receiving one, as in training."""
        a = self.checkpoint.read(self._expect(f"mapl.cut_{self.cuts[number]}.A"))
        basis = None
        if self._has_basis:
            stage = number if direction == "encode" else number + 1
            basis = self.checkpoint.read(self._stage_key(stage, "basis"))
        return Operands().get(direction, a, basis, dtype)


def find_boundaries(checkpoint: MegatronCheckpoint) -> Boundaries | None:
    """The boundaries that the checkpoint was trained through, or None.

    Raises:
        ConversionError: settings and tensors do not fit each other.
    """
    args = checkpoint.args
    places = {
        int(match[1])
        for key in checkpoint.tensors
        if (match := re.match(r"mapl\.cut_(\d+)\.", key)) is not None
    }
    if not places or getattr(args, f"{_PREFIX}rank", None) is None:
        return None
    given = {field.name: getattr(args, _PREFIX + field.name, None) for field in fields(MaplConfig)}
    try:
        config = MaplConfig(**{name: value for name, value in given.items() if value is not None})
        plan = plan_boundaries(config, hidden_size=args.hidden_size, boundaries=len(places))
    except ValueError as error:
        raise ConversionError(
            f"--load {checkpoint.folder}: its arguments and its boundaries do not fit: {error}"
        ) from None
    cuts = sorted(places)
    stages = list(pairwise([0, *cuts, args.num_layers]))
    found = Boundaries(checkpoint, config, plan, cuts, stages)
    if found.shared_anchor:
        first, *others = [checkpoint.read(found._stage_key(n, "table")) for n in range(len(stages))]
        if not all(torch.equal(first, other) for other in others):
            raise ConversionError(
                f"--load {checkpoint.folder}: its stages hold different frozen tables, though "
                "--mapl-anchor static draws one for all of them"
            )
    return found
