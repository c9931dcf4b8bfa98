# SPDX-License-Identifier: Apache-2.0
"""What a plan recommends, in words."""

from itertools import groupby

from plan_memory import added_bytes
from plan_prediction import Prediction
from plan_recommendation import TOLERANCE, Recommendation
from plan_text import digits, wrapped


def said_recommendation(advice: Recommendation, plain: Prediction) -> list[str]:
    """Lines.

    Args:
        advice: what to train with.
        plain: plain Megatron's step.
    """
    lines = [f"Recommended for a gap of at most {advice.budget:g}%:"]
    prediction, measured = advice.prediction, advice.measured
    if measured is None:
        why = _why_plain(advice)
        return [*lines, wrapped(f"plain Megatron, without --mapl-rank: {why}.", "  ")]
    speed_up = plain.seconds / prediction.seconds
    if len({setting.name for setting in advice.boundaries if setting is not None}) > 1:
        source = f"Gap: at most {measured.gap:+.2f}%, as {measured.name} at all boundaries"
    else:
        source = f"As {measured.name}: gap {measured.gap:+.2f}%"
    text = (
        f"{source}; step {digits(prediction.seconds)} s, "
        f"{prediction.tokens_per_second:,.0f} tokens/s, {speed_up:.2f}× as fast as uncompressed, "
        f"{prediction.ratio:.2f}× fewer bytes. "
        f"It adds at most {added_bytes(prediction) / 2**30:,.2f} GiB to a device's memory."
    )
    return [*lines, f"  {advice.command_line}", *_said_boundaries(advice), wrapped(text, "  ")]


def _why_plain(advice: Recommendation) -> str:
    if advice.least is None:
        return "no measured setting fits this job"
    if advice.least > advice.budget:
        return (
            f"no measured setting loses at most {advice.budget:g}% (the least is "
            f"{advice.least:+.2f}%)"
        )
    return f"no setting within the budget makes the step shorter by more than {TOLERANCE:.0%}"


def _said_boundaries(advice: Recommendation) -> list[str]:
    """Neighbours that are alike in one line."""
    settled = advice.plan
    assert settled is not None, "it has a setting of MAPL"
    each = [
        "uncompressed, which costs next to nothing"
        if setting is None
        else f"rank {rank}, {forward} forward, {backward} back, as {setting.name} "
        f"({setting.gap:+.2f}%)"
        for setting, rank, forward, backward in zip(
            advice.boundaries, settled.ranks, settled.forward_codecs, settled.backward_codecs,
            strict=True,
        )
    ]  # fmt: skip
    lines, number = [], 0
    for said, alike in groupby(each):
        last = number + len(list(alike)) - 1
        which = f"boundary {number}" if last == number else f"boundaries {number} to {last}"
        lines.append(f"  {which}: {said}")
        number = last + 1
    return lines
