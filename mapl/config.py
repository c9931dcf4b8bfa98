# SPDX-License-Identifier: Apache-2.0
"""The settings of MAPL: one frozen dataclass, from which the `--mapl-*` flags are generated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mapl.codecs import CodecSettings, check_lowrank, check_rvq, check_topk
from mapl.codecs.settings import LOWRANK_FORWARD

AnchorKind = Literal["factorized", "bigram", "none", "static", "full"]
ProjectorKind = Literal["learned", "fixed", "unconstrained", "subspace", "none"]
CodecName = Literal["pipeline", "fp8", "int8", "int4", "rvq", "topk", "lowrank"]
CheckpointMode = Literal["match", "fresh", "drop"]

#: Codecs with one scale for each group of numbers.
_GROUPED = ("fp8", "int8", "int4")

#: Projectors that have a gradient, which the two sides of a boundary exchange.
LEARNED = ("learned", "unconstrained")


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

    anchor: AnchorKind = "bigram"
    """The token anchor that is subtracted before and added back after a boundary: factorized
    (E P, E trained, P fixed), bigram (the same, and rows for the token together with the one before
    it), none, static (a frozen random table), full (a trained table)."""

    anchor_rank: int | None = None
    """Rank r_a of the factorized and bigram anchors; it costs memory, no traffic. Default: hidden
    size / 4."""

    anchor_buckets: int | None = None
    """m, rows of the bigram anchor's second table, into which bigrams are hashed; it costs memory,
    no traffic. Default: the next power of two from 4 times the vocabulary on, at most 131072."""

    projector: ProjectorKind = "learned"
    """How the projector A is trained: learned (on the Stiefel manifold, by SPEL), fixed (random
    orthonormal), unconstrained (no manifold), subspace (a baseline, Subspace Networks: fixed, and
    the model's weights are held in its span; needs --mapl-anchor static); none: no projector, the
    codecs quantise the activations themselves (ranks must then be the hidden size)."""

    projector_lr_mult: float = 0.1
    """The projector's learning rate as a multiple of Megatron's."""

    projector_exchange: Literal["fp32", "bf16"] = "bf16"
    """The dtype in which the two sides of a boundary exchange the projector's gradient, once a
    step."""

    projector_start_step: int | None = None
    """Step N from which the projectors start anew, one a step: that of boundary p (0, 1, ...) in
    step N + p, from the leading principal directions of what crosses there in that step; fixed
    stays there. Default: they start as they were drawn."""

    forward_codec: list[CodecName] = field(default_factory=lambda: ["int8"])
    """How the latents' numbers become bytes: pipeline (as they are, in the model's dtype), fp8,
    int8, int4 (a scale for each group), rvq (residual vector quantisation), topk (the largest
    numbers and their places); one for all boundaries, or one for each."""

    backward_codec: list[CodecName] = field(default_factory=lambda: ["int4"])
    """The same for the latents' gradients; int8 and int4 round them stochastically. lowrank, for
    gradients alone, sends a product of two thin matrices and adds what that leaves out to the next
    micro-batch."""

    codec_group_size: int | None = None
    """Numbers that share a scale in fp8, int8 and int4. Default: 64."""

    topk: int | None = None
    """K, numbers of largest magnitude that topk keeps of each token; it needs this."""

    lowrank_q: int | None = None
    """Q, columns of the two matrices that lowrank sends for a micro-batch; it needs this."""

    rvq_groups: int | None = None
    """G, parts that rvq splits a latent into. Default: rank / 8."""

    rvq_rounds: int | None = None
    """R, codes that rvq gives each part, one after the other for what is left. Default: 4."""

    rvq_codes: int | None = None
    """K, codes of a codebook, a power of two. Default: 256."""

    rvq_decay: float | None = None
    """Decay a step of the moving averages behind the codebooks. Default: 0.99."""

    rvq_sync: Literal["streaming", "full", "frozen"] | None = None
    """How the receiver follows the codebooks: streaming (each micro-batch carries a few entries),
    full (all entries after each step), frozen (never again after the first 16 steps). Default:
    streaming."""

    rvq_sync_entries: int | None = None
    """Entries of each codebook that a micro-batch carries when streaming. Default: 1."""

    rvq_order: Literal["round-robin", "random"] | None = None
    """The order in which entries are streamed. Default: round-robin."""

    tensor_parallel_split: bool = True
    """Whether tensor-parallel ranks that hold the same latents each send a part of them and gather
    the rest on the other side. It applies without --sequence-parallel, if the sequence length is a
    multiple of the tensor-parallel size."""

    receive_ahead: int | None = None
    """Payloads of each direction that are received ahead of their use, and sent without waiting,
    while the stage computes; 0 waits for each as Megatron does. Default: 2 over gloo without
    virtual stages, else 0."""

    virtual_stages: int | None = None
    """Boundaries inside one process: cuts the model where a pipeline of so many equal stages would
    be cut, with the same projectors, anchors and codecs, whose payloads are made, counted and read
    but cross no network. For studies of quality; needs --pipeline-model-parallel-size 1. Default:
    the boundaries are those of the pipeline."""

    checkpoint: CheckpointMode = "match"
    """What --load does when the checkpoint's boundaries do not fit this run's: match (an error),
    fresh (load the model, start the boundaries and the optimizer anew), drop (without --mapl-rank:
    load the model into plain Megatron, without the boundaries)."""

    report_dir: str | None = None
    """Where mapl_traffic.json and mapl_metrics.jsonl go. Default: --save, else ./mapl-report."""

    log_interval: int | None = None
    """Steps between two lines of mapl_metrics.jsonl. Default: --log-interval."""

    geometry_interval: int | None = None
    """Steps between two measurements of what the projectors keep, written to mapl_metrics.jsonl as
    `geometry`: a multiple of --mapl-log-interval. Each sends every projector once in fp32 to rank
    0, which the traffic report does not count. Default: never."""

    def __post_init__(self) -> None:
        if not self.rank or min(self.rank) < 0:
            raise ValueError(
                f"--mapl-rank {spaced(self.rank)}: a rank is a positive number of dimensions, or "
                "0 to leave a boundary uncompressed"
            )
        if max(self.rank) == 0:
            raise ValueError(
                f"--mapl-rank {spaced(self.rank)} compresses nothing; give a positive rank, or "
                "leave --mapl-rank out for plain Megatron"
            )
        self._check_anchor()
        if self.projector not in LEARNED and self.projector_lr_mult != 0.1:
            raise ValueError(
                f"--mapl-projector-lr-mult {self.projector_lr_mult} has no effect with "
                f"--mapl-projector {self.projector}; leave it out"
            )
        if not 0 < self.projector_lr_mult < float("inf"):
            raise ValueError(
                f"--mapl-projector-lr-mult {self.projector_lr_mult} must be positive and finite; "
                "use --mapl-projector fixed for a projector that does not move"
            )
        self._check_projector_start()
        has_exchange = self.projector in LEARNED or self.projector_start_step is not None
        if not has_exchange and self.projector_exchange != "bf16":
            raise ValueError(
                f"--mapl-projector-exchange {self.projector_exchange} has no effect with "
                f"--mapl-projector {self.projector}, which has no gradient; leave it out"
            )
        if self.projector == "none" and self.anchor != "none":
            raise ValueError(
                f"--mapl-projector none sends the activations themselves, without an anchor; give "
                f"--mapl-anchor none in place of {self.anchor}"
            )
        if self.projector == "subspace":
            self._check_subspace()
        self._check_codecs()
        if self.receive_ahead is not None and self.receive_ahead < 0:
            raise ValueError(
                f"--mapl-receive-ahead {self.receive_ahead} must be a number of payloads, or 0 to "
                "wait for each"
            )
        if self.virtual_stages is not None and self.virtual_stages < 2:
            raise ValueError(
                f"--mapl-virtual-stages {self.virtual_stages} has no boundary; give 2 or more"
            )
        if self.log_interval is not None and self.log_interval <= 0:
            raise ValueError(f"--mapl-log-interval {self.log_interval} must be at least 1 step")
        self._check_geometry()

    def _check_projector_start(self) -> None:
        step = self.projector_start_step
        if step is None:
            return
        if step < 1:
            raise ValueError(
                f"--mapl-projector-start-step {step} must be at least 1, the first step; leave it "
                "out to start from the projector as it was drawn"
            )
        if self.projector == "none":
            raise ValueError(
                f"--mapl-projector-start-step {step} has no effect with --mapl-projector none, "
                "which has no projectors to start; leave it out"
            )
        if self.projector == "subspace":
            raise ValueError(
                f"--mapl-projector-start-step {step} cannot be used with --mapl-projector "
                "subspace, whose weights are held in the span of the projector as it was drawn; "
                "leave it out, or use --mapl-projector fixed"
            )

    def _check_anchor(self) -> None:
        if self.anchor_rank is not None:
            if self.anchor not in ("factorized", "bigram"):
                raise ValueError(
                    f"--mapl-anchor-rank {self.anchor_rank} has no effect with --mapl-anchor "
                    f"{self.anchor}; leave it out, or use --mapl-anchor factorized or bigram"
                )
            if self.anchor_rank <= 0:
                raise ValueError(
                    f"--mapl-anchor-rank {self.anchor_rank} must be positive; use --mapl-anchor "
                    "none for no anchor"
                )
        if self.anchor_buckets is not None:
            if self.anchor != "bigram":
                raise ValueError(
                    f"--mapl-anchor-buckets {self.anchor_buckets} has no effect with --mapl-anchor "
                    f"{self.anchor}; leave it out, or use --mapl-anchor bigram"
                )
            if not 1 <= self.anchor_buckets < 2**31:
                raise ValueError(
                    f"--mapl-anchor-buckets {self.anchor_buckets} must be from 1 to 2147483647; "
                    "use --mapl-anchor factorized for no second table"
                )

    def _check_geometry(self) -> None:
        if self.geometry_interval is None:
            return
        if self.geometry_interval <= 0:
            raise ValueError(
                f"--mapl-geometry-interval {self.geometry_interval} must be at least 1 step; leave "
                "it out to measure nothing"
            )
        if self.projector == "none":
            raise ValueError(
                f"--mapl-geometry-interval {self.geometry_interval} has no effect with "
                "--mapl-projector none, which has no projectors to measure; leave it out"
            )

    def _check_subspace(self) -> None:
        if self.anchor != "static":
            raise ValueError(
                f"--mapl-projector subspace needs --mapl-anchor static, not {self.anchor}: the "
                "same frozen table on every stage; add --mapl-anchor static"
            )
        if len({*self.rank}) > 1:
            raise ValueError(
                f"--mapl-rank {spaced(self.rank)} with --mapl-projector subspace: all boundaries "
                "share one subspace; give one rank for all of them"
            )

    @property
    def static_anchor_std(self) -> float:
        """Standard deviation of the static anchor's table."""
        return 1.0 if self.projector == "subspace" else 0.02

    def _check_codecs(self) -> None:
        used = {*self.forward_codec, *self.backward_codec}
        if self.codec_group_size is not None and not used.intersection(_GROUPED):
            raise ValueError(
                f"--mapl-codec-group-size {self.codec_group_size} has no effect without a codec "
                f"that scales groups ({', '.join(_GROUPED)}); leave it out, or name one with "
                "--mapl-forward-codec or --mapl-backward-codec"
            )
        for name, value in vars(self).items():
            if name.startswith("rvq_") and value is not None and "rvq" not in used:
                raise ValueError(
                    f"--mapl-{name.replace('_', '-')} {value} has no effect without rvq; leave it "
                    "out, or give --mapl-forward-codec rvq or --mapl-backward-codec rvq"
                )
        if self.topk is not None and "topk" not in used:
            raise ValueError(
                f"--mapl-topk {self.topk} has no effect without topk; leave it out, or give "
                "--mapl-forward-codec topk or --mapl-backward-codec topk"
            )
        if "lowrank" in self.forward_codec:
            raise ValueError(LOWRANK_FORWARD)
        if self.lowrank_q is not None and "lowrank" not in used:
            raise ValueError(
                f"--mapl-lowrank-q {self.lowrank_q} has no effect without lowrank; leave it out, "
                "or give --mapl-backward-codec lowrank"
            )
        if self.rvq_sync in ("full", "frozen"):
            for name in ("rvq_sync_entries", "rvq_order"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"--mapl-{name.replace('_', '-')} {value} has no effect with --mapl-rvq-"
                        f"sync {self.rvq_sync}; leave it out, or use --mapl-rvq-sync streaming"
                    )
        if self.codec_group_size is not None and self.codec_group_size < 1:
            raise ValueError(
                f"--mapl-codec-group-size {self.codec_group_size} must be at least 1; 64 is usual"
            )
        if "rvq" in used:
            check_rvq(self.codec_settings)
        if "topk" in used:
            check_topk(self.codec_settings)
        if "lowrank" in used:
            check_lowrank(self.codec_settings)

    @property
    def codec_settings(self) -> CodecSettings:
        """The codecs' settings, with their defaults for what was left out."""
        given = {
            "group_size": self.codec_group_size,
            "topk": self.topk,
            "lowrank_q": self.lowrank_q,
            **{name: value for name, value in vars(self).items() if name.startswith("rvq_")},
        }
        return CodecSettings(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class EmulationConfig:
    """A slow network between stages, emulated; for jobs with and without boundaries.

    Raises:
        ValueError: a setting is out of range.
    """

    emulate_bandwidth: float | None = None
    """Megabits a second of each link between neighbouring stages, in each direction. Default: as
    fast as the network is."""

    emulate_latency: float | None = None
    """Milliseconds that each transfer between neighbouring stages takes longer, one way. Default:
    none."""

    def __post_init__(self) -> None:
        if self.emulate_bandwidth is not None and not 0 < self.emulate_bandwidth < float("inf"):
            raise ValueError(
                f"--mapl-emulate-bandwidth {self.emulate_bandwidth} must be a positive number of "
                "Mbit/s; leave it out for the network as it is"
            )
        if self.emulate_latency is not None and not 0 <= self.emulate_latency < float("inf"):
            raise ValueError(
                f"--mapl-emulate-latency {self.emulate_latency} must be a number of milliseconds, "
                "0 or more"
            )


def spaced(values: Sequence[object]) -> str:
    """As they stand on a command line."""
    return " ".join(map(str, values))
