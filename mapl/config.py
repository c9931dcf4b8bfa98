# SPDX-License-Identifier: Apache-2.0
"""The settings of MAPL: one frozen dataclass, from which the `--mapl-*` flags are generated."""

from dataclasses import dataclass
from typing import Literal

AnchorKind = Literal["factorized", "none", "static", "full"]
ProjectorKind = Literal["learned", "fixed", "unconstrained"]
CheckpointMode = Literal["match", "fresh", "drop"]


@dataclass(frozen=True, kw_only=True)
class MaplConfig:
    """Learned subspace compression of the boundaries between pipeline stages.

    Method: Janson, Oyallon, Belilovsky, arXiv 2606.05484.

    Raises:
        ValueError: a setting is out of range, or would be ignored beside the others.
    """

    rank: list[int]
    """Projector rank r, the width of what crosses a boundary: one number for all boundaries, or one
    for each. 0 leaves that boundary uncompressed. Without it the job is plain Megatron."""

    anchor: AnchorKind = "factorized"
    """The token anchor that is subtracted before and added back after a boundary: factorized
    (E P, E trained, P fixed), none, static (a frozen random table), full (a trained table)."""

    anchor_rank: int | None = None
    """Rank r_a of the factorized anchor; it costs memory, no traffic. Default: hidden size / 4."""

    projector: ProjectorKind = "learned"
    """How the projector A is trained: learned (on the Stiefel manifold, by SPEL), fixed (random
    orthonormal), unconstrained (no manifold)."""

    projector_lr_mult: float = 0.1
    """The projector's learning rate as a multiple of Megatron's."""

    checkpoint: CheckpointMode = "match"
    """What --load does when the checkpoint's boundaries do not fit this run's: match (an error),
    fresh (load the model, start the boundaries and the optimizer anew), drop (without --mapl-rank:
    load the model into plain Megatron, without the boundaries)."""

    report_dir: str | None = None
    """Where mapl_traffic.json and mapl_metrics.jsonl go. Default: --save, else ./mapl-report."""

    log_interval: int | None = None
    """Steps between two lines of mapl_metrics.jsonl. Default: --log-interval."""

    def __post_init__(self) -> None:
        if not self.rank or min(self.rank) < 0:
            raise ValueError(
                f"--mapl-rank {_spaced(self.rank)}: a rank is a positive number of dimensions, or "
                "0 to leave a boundary uncompressed"
            )
        if max(self.rank) == 0:
            raise ValueError(
                f"--mapl-rank {_spaced(self.rank)} compresses nothing; give a positive rank, or "
                "leave --mapl-rank out for plain Megatron"
            )
        if self.anchor_rank is not None:
            if self.anchor != "factorized":
                raise ValueError(
                    f"--mapl-anchor-rank {self.anchor_rank} has no effect with --mapl-anchor "
                    f"{self.anchor}; leave it out, or use --mapl-anchor factorized"
                )
            if self.anchor_rank <= 0:
                raise ValueError(
                    f"--mapl-anchor-rank {self.anchor_rank} must be positive; use --mapl-anchor "
                    "none for no anchor"
                )
        if self.projector == "fixed" and self.projector_lr_mult != 0.1:
            raise ValueError(
                f"--mapl-projector-lr-mult {self.projector_lr_mult} has no effect with "
                "--mapl-projector fixed; leave it out"
            )
        if not 0 < self.projector_lr_mult < float("inf"):
            raise ValueError(
                f"--mapl-projector-lr-mult {self.projector_lr_mult} must be positive and finite; "
                "use --mapl-projector fixed for a projector that does not move"
            )
        if self.log_interval is not None and self.log_interval <= 0:
            raise ValueError(f"--mapl-log-interval {self.log_interval} must be at least 1 step")

    def plan(self, *, hidden_size: int, boundaries: int) -> "BoundaryPlan":
        """Settles the ranks for a model.

        Args:
            hidden_size: d, the width of the activations.
            boundaries: how many pairs of neighbouring stages there are.

        Raises:
            ValueError: the ranks do not fit the model or the pipeline.
        """
        if boundaries < 1:
            raise ValueError(
                f"--mapl-rank {_spaced(self.rank)}: a pipeline of one stage has no boundary to "
                "compress; use --pipeline-model-parallel-size 2 or more, or leave --mapl-rank out"
            )
        if len(self.rank) not in (1, boundaries):
            raise ValueError(
                f"--mapl-rank {_spaced(self.rank)} gives {len(self.rank)} ranks for {boundaries} "
                f"boundaries; give one rank for all of them or {boundaries} ranks"
            )
        if max(self.rank) > hidden_size:
            raise ValueError(
                f"--mapl-rank {_spaced(self.rank)} exceeds --hidden-size {hidden_size}; a rank is "
                f"at most {hidden_size}"
            )
        ranks = self.rank * boundaries if len(self.rank) == 1 else self.rank
        anchor_rank = self.anchor_rank if self.anchor_rank is not None else max(1, hidden_size // 4)
        if anchor_rank > hidden_size:
            raise ValueError(
                f"--mapl-anchor-rank {anchor_rank} exceeds --hidden-size {hidden_size}; it is at "
                f"most {hidden_size}"
            )
        return BoundaryPlan(hidden_size=hidden_size, ranks=tuple(ranks), anchor_rank=anchor_rank)


@dataclass(frozen=True)
class BoundaryPlan:
    """The ranks of one model's boundaries, in pipeline order."""

    hidden_size: int
    ranks: tuple[int, ...]
    anchor_rank: int

    def width(self, boundary: int) -> int:
        """How many numbers a token has on the wire at `boundary`: r, or d if uncompressed."""
        return self.ranks[boundary] or self.hidden_size


def _spaced(ranks: list[int]) -> str:
    return " ".join(map(str, ranks))
