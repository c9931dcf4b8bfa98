# SPDX-License-Identifier: Apache-2.0
"""The settings of MAPL, settled for one model and its pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass

from mapl.codecs import check_lowrank, check_rvq, check_topk
from mapl.codecs.residual_vq import WHOLE_AFTER
from mapl.config import CodecName, MaplConfig, spaced


@dataclass(frozen=True)
class BoundaryPlan:
    """The ranks and codecs of one model's boundaries, in pipeline order.

    Attributes:
        projector_starts: the step in which each boundary's projector starts anew, or None.
    """

    hidden_size: int
    ranks: tuple[int, ...]
    anchor_rank: int
    forward_codecs: tuple[CodecName, ...]
    backward_codecs: tuple[CodecName, ...]
    projector_starts: tuple[int | None, ...]

    def width(self, boundary: int) -> int:
        """How many numbers a token has on the wire at `boundary`: r, or d if uncompressed."""
        return self.ranks[boundary] or self.hidden_size


def plan_boundaries(
    config: MaplConfig, *, hidden_size: int, boundaries: int, shards: int = 1
) -> BoundaryPlan:
    """Settles the ranks and codecs for a model.

    Args:
        config: the settings.
        hidden_size: d, the width of the activations.
        boundaries: how many pairs of neighbouring stages there are.
        shards: how many tensor-parallel ranks send a part of one micro-batch each.

    Raises:
        ValueError: the ranks do not fit the model or the pipeline.
    """
    if boundaries < 1:
        raise ValueError(
            f"--mapl-rank {spaced(config.rank)}: a pipeline of one stage has no boundary to "
            "compress; use --pipeline-model-parallel-size 2 or more, or --mapl-virtual-stages for "
            "boundaries inside one process, or leave --mapl-rank out"
        )
    if len(config.rank) not in (1, boundaries):
        raise ValueError(
            f"--mapl-rank {spaced(config.rank)} gives {len(config.rank)} ranks for {boundaries} "
            f"boundaries; give one rank for all of them or {boundaries} ranks"
        )
    if max(config.rank) > hidden_size:
        raise ValueError(
            f"--mapl-rank {spaced(config.rank)} exceeds --hidden-size {hidden_size}; a rank is "
            f"at most {hidden_size}"
        )
    ranks = config.rank * boundaries if len(config.rank) == 1 else config.rank
    if config.projector == "none" and not {*ranks} <= {0, hidden_size}:
        raise ValueError(
            f"--mapl-rank {spaced(config.rank)} with --mapl-projector none: without a projector "
            f"all numbers cross; give the --hidden-size, {hidden_size}, or 0"
        )
    anchor_rank = config.anchor_rank if config.anchor_rank is not None else max(1, hidden_size // 4)
    if anchor_rank > hidden_size:
        raise ValueError(
            f"--mapl-anchor-rank {anchor_rank} exceeds --hidden-size {hidden_size}; it is at "
            f"most {hidden_size}"
        )
    settled = BoundaryPlan(
        hidden_size=hidden_size,
        ranks=tuple(ranks),
        anchor_rank=anchor_rank,
        forward_codecs=_each(config.forward_codec, "--mapl-forward-codec", ranks),
        backward_codecs=_each(config.backward_codec, "--mapl-backward-codec", ranks),
        projector_starts=_projector_starts(config.projector_start_step, ranks),
    )
    for boundary in range(boundaries):
        used = settled.forward_codecs[boundary], settled.backward_codecs[boundary]
        if "rvq" in used:
            check_rvq(config.codec_settings, width=settled.width(boundary), shards=shards)
            _check_frozen(config, boundary, settled.projector_starts[boundary])
        if "topk" in used:
            check_topk(config.codec_settings, width=settled.width(boundary))
        if "lowrank" in used:
            check_lowrank(config.codec_settings, width=settled.width(boundary))
    return settled


def payloads_ahead(config: MaplConfig, *, backend: str, virtual: bool) -> int:
    """How many payloads of each direction are received ahead, by the user's wish or by default.

    Args:
        backend: of torch.distributed between the stages.
        virtual: whether a process holds several stages.
    """
    if config.receive_ahead is not None:
        return config.receive_ahead
    return 2 if backend == "gloo" and not virtual else 0


def _projector_starts(first: int | None, ranks: Sequence[int]) -> tuple[int | None, ...]:
    """Boundary p in step N + p, after all before it, if it is compressed."""
    return tuple(
        first + boundary if first is not None and rank else None
        for boundary, rank in enumerate(ranks)
    )


def _check_frozen(config: MaplConfig, boundary: int, start: int | None) -> None:
    """Codebooks that are fixed must have been learned for the projector that they serve."""
    frozen = max(WHOLE_AFTER)
    if config.rvq_sync == "frozen" and start is not None and start >= frozen:
        raise ValueError(
            f"--mapl-projector-start-step {config.projector_start_step} starts the projector of "
            f"boundary {boundary} in step {start}, after --mapl-rvq-sync frozen has fixed its "
            f"codebooks, in step {frozen}, for another one; start earlier, or use --mapl-rvq-sync "
            "streaming"
        )


def _each(codecs: list[CodecName], flag: str, ranks: list[int]) -> tuple[CodecName, ...]:
    """One codec for each boundary.

    Raises:
        ValueError: their number does not fit, or one is named for an uncompressed boundary.
    """
    if len(codecs) == 1:
        return tuple(codecs[0] if rank else "pipeline" for rank in ranks)
    if len(codecs) != len(ranks):
        raise ValueError(
            f"{flag} {spaced(codecs)} gives {len(codecs)} codecs for {len(ranks)} boundaries; "
            f"give one codec for all of them or {len(ranks)} codecs"
        )
    for boundary, (codec, rank) in enumerate(zip(codecs, ranks, strict=True)):
        if not rank and codec != "pipeline":
            raise ValueError(
                f"{flag} {spaced(codecs)} names {codec} for boundary {boundary}, which "
                "--mapl-rank 0 leaves uncompressed; name pipeline there, or give it a rank"
            )
    return tuple(codecs)
