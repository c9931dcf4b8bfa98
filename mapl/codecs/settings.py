# SPDX-License-Identifier: Apache-2.0
"""The settings of the codecs and their checks."""

from dataclasses import dataclass
from typing import Literal, get_args

RvqSync = Literal["streaming", "full", "frozen"]
RvqOrder = Literal["round-robin", "random"]

MAX_CODES = 65536
_MAX_TOPK_WIDTH = 65536
_USUAL_GROUP = 8

#: Why lowrank is refused for activations.
LOWRANK_FORWARD = (
    "--mapl-forward-codec lowrank: it is for gradients, since it adds what it left out of one "
    "micro-batch to the next, whose activations are those of other tokens; give "
    "--mapl-backward-codec lowrank, and name another codec forward"
)


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """What a user can set; a codec reads what concerns it.

    Attributes:
        group_size: numbers that share a scale (fp8, int8, int4).
        topk: numbers that are kept of each row (topk); None if no codec needs it.
        lowrank_q: columns of the matrices that are sent (lowrank); None if no codec needs it.
        rvq_groups: G; None stands for `default_rvq_groups`.
        rvq_rounds: R.
        rvq_codes: K.
        rvq_decay: γ.
        rvq_sync: how the receiver gets the codebooks, see `mapl.codecs.residual_vq`.
        rvq_sync_entries: entries of each codebook that a payload carries (streaming).
        rvq_order: order in which the entries come by (streaming).
    """

    group_size: int = 64
    topk: int | None = None
    lowrank_q: int | None = None
    rvq_groups: int | None = None
    rvq_rounds: int = 4
    rvq_codes: int = 256
    rvq_decay: float = 0.99
    rvq_sync: RvqSync = "streaming"
    rvq_sync_entries: int = 1
    rvq_order: RvqOrder = "round-robin"


def check_topk(settings: CodecSettings, *, width: int | None = None) -> int:
    """Checks all that concerns top-k sparsification.

    Args:
        settings: the settings.
        width: w of the rows; None if it is not known yet.

    Returns:
        k, the numbers that are kept of each row.

    Raises:
        ValueError: k is missing or out of range, or rows are too wide; names flag, value and
            remedy.
    """
    kept = settings.topk
    if kept is None:
        raise ValueError(
            "--mapl-topk is missing: the codec topk needs to know how many numbers of each row it "
            "keeps; give --mapl-topk K, or name another codec"
        )
    if kept < 1:
        raise ValueError(f"--mapl-topk {kept} must keep at least 1 number of each row")
    if width is None:
        return kept
    if width > _MAX_TOPK_WIDTH:
        raise ValueError(
            f"--mapl-topk {kept}: places in rows of {width} numbers do not fit 16 bits; use rows "
            f"of at most {_MAX_TOPK_WIDTH} (a smaller --mapl-rank), or another codec"
        )
    if kept > width:
        raise ValueError(
            f"--mapl-topk {kept} exceeds the {width} numbers of a row; it is at most {width}"
        )
    return kept


def check_lowrank(
    settings: CodecSettings, *, width: int | None = None, rows: int | None = None
) -> int:
    """Checks all that concerns products of thin matrices.

    Args:
        settings: the settings.
        width: w of the rows; None if it is not known yet.
        rows: n, how many rows a payload has; None if it is not known yet.

    Returns:
        q, the columns of both matrices.

    Raises:
        ValueError: q is missing or out of range; names flag, value and remedy.
    """
    columns = settings.lowrank_q
    if columns is None:
        raise ValueError(
            "--mapl-lowrank-q is missing: the codec lowrank needs to know the rank of the matrices "
            "it sends; give --mapl-lowrank-q Q (16 is usual), or name another codec"
        )
    if columns < 1:
        raise ValueError(f"--mapl-lowrank-q {columns} must be at least 1")
    for limit, what in (
        (width, "numbers of a row"),
        (rows, "tokens of a micro-batch that one process sends"),
    ):
        if limit is not None and columns > limit:
            raise ValueError(
                f"--mapl-lowrank-q {columns} exceeds the {limit} {what}; it is at most {limit}"
            )
    return columns


def default_rvq_groups(width: int) -> int:
    """G for rows of `width` numbers: groups of 8, else the most groups of at least 8 numbers.

    In other words the largest divisor of `width` that is at most width / 8, and 1 below 8.
    """
    most = max(1, width // _USUAL_GROUP)
    return next(groups for groups in range(most, 0, -1) if width % groups == 0)


def check_rvq(settings: CodecSettings, *, width: int | None = None, shards: int = 1) -> None:
    """Checks all that concerns residual vector quantisation.

    Args:
        settings: the settings.
        width: w of the rows; None if it is not known yet.
        shards: T, how many processes send a part of the same rows.

    Raises:
        ValueError: a setting is out of range, or would be ignored beside the others; names flag,
            value and remedy.
    """
    groups, codes, entries = settings.rvq_groups, settings.rvq_codes, settings.rvq_sync_entries
    if groups is not None and groups < 1:
        raise ValueError(f"--mapl-rvq-groups {groups} must be at least 1")
    if width is not None and groups is not None and width % groups:
        raise ValueError(
            f"--mapl-rvq-groups {groups} does not divide the {width} numbers of a row; use a "
            f"divisor, such as {default_rvq_groups(width)}"
        )
    if settings.rvq_rounds < 1:
        raise ValueError(f"--mapl-rvq-rounds {settings.rvq_rounds} must be at least 1")
    if not 2 <= codes <= MAX_CODES or codes & (codes - 1):
        raise ValueError(
            f"--mapl-rvq-codes {codes} must be a power of two from 2 to {MAX_CODES}, so that a "
            "code fills its bits; 256 makes one byte"
        )
    if not 0 <= settings.rvq_decay < 1:
        raise ValueError(
            f"--mapl-rvq-decay {settings.rvq_decay} must be at least 0 and below 1; 0.99 averages "
            "over some 100 steps"
        )
    for flag, value, known in (
        ("sync", settings.rvq_sync, get_args(RvqSync)),
        ("order", settings.rvq_order, get_args(RvqOrder)),
    ):
        if value not in known:
            raise ValueError(f"--mapl-rvq-{flag} {value} is unknown; use one of {', '.join(known)}")
    if settings.rvq_sync == "streaming":
        _check_entries(entries, codes, shards)
        return
    for flag, ignored in (
        (f"sync-entries {entries}", entries != 1),
        (f"order {settings.rvq_order}", settings.rvq_order != "round-robin"),
    ):
        if ignored:
            raise ValueError(
                f"--mapl-rvq-{flag} has no effect with --mapl-rvq-sync {settings.rvq_sync}, whose "
                "payloads carry no entries; leave it out, or use --mapl-rvq-sync streaming"
            )


def _check_entries(entries: int, codes: int, shards: int) -> None:
    if not 1 <= entries <= codes:
        raise ValueError(
            f"--mapl-rvq-sync-entries {entries} must be from 1 to --mapl-rvq-codes {codes}"
        )
    if entries * shards > codes:
        remedy = f"use at most {codes // shards}, or more codes"
        if shards > codes:
            remedy = f"use --mapl-rvq-codes {1 << (shards - 1).bit_length()} or more"
        raise ValueError(
            f"--mapl-rvq-sync-entries {entries}: {shards} processes that send {entries} entries "
            f"each would send more than the {codes} codes there are in one payload; {remedy}"
        )
