# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline_step import Link
from plan_gaps import Gaps
from plan_job import Job
from plan_memory import added_bytes
from plan_prediction import Machine, Prediction
from plan_recommendation import TOLERANCE, Recommendation
from text_table import columns

_NAMES = ("setting", "gap", "ratio", "step s", "tokens/s", "bubble", "faster", "bottleneck")

_WIDTH = 100

_LEGEND = (
    "Gap: of the validation loss to uncompressed training, as measured with the model below; –: "
    "not measured. Ratio: uncompressed bytes over all bytes that cross, both of both directions. "
    "Bubble: time beyond the least that computation takes, over that; without a network it is "
    "(P − 1) / m. Tokens/s: of one replica. Bottleneck: what would shorten the step most if it "
    "were twice as fast."
)


@dataclass(frozen=True)
class Plan:
    """All that plan.py has worked out.

    Attributes:
        speed: where the devices' speed comes from.
        predictions: uncompressed first.
        refused: setting → why the job cannot use it.
    """

    job: Job
    machine: Machine
    speed: str
    gaps: Gaps
    predictions: Sequence[Prediction]
    recommendation: Recommendation
    refused: dict[str, str]

    @property
    def shown(self) -> list[Prediction]:
        """Uncompressed, those without a measured gap, and those that no other one beats."""
        plain, *others = self.predictions
        unknown = [p for p in others if p.setting.gap is None]
        front = [p for p in others if p.setting.gap is not None and not self._is_beaten(p)]
        return [plain, *unknown, *sorted(front, key=lambda p: -p.seconds)]

    def _is_beaten(self, one: Prediction) -> bool:
        """Whether another one loses less and is about as fast, or as much and is faster."""
        for other in self.predictions:
            own, gap = _gap(one), _gap(other)
            about_as_fast = other.seconds <= one.seconds * (1 + TOLERANCE)
            if (gap < own and about_as_fast) or (gap == own and other.seconds < one.seconds):
                return True
        return False


def _gap(prediction: Prediction) -> float:
    gap = prediction.setting.gap
    return float("inf") if gap is None else gap


def page(plan: Plan) -> str:
    """The plan for the terminal."""
    job, shown = plan.job, plan.shown
    cells = [_cells(prediction, plan.predictions[0]) for prediction in shown]
    left_out = len(plan.predictions) - len(shown)
    parts = [
        _said_job(job),
        *_said_links(plan),
        f"Devices: {plan.machine.flops / 1e12:,.4g} TFLOP/s each, {plan.speed}.",
        "",
        columns(_NAMES, cells, markdown=False),
        "",
        *([f"{left_out} measured settings lose more and are no faster than one of these."]
          if left_out else []),
        _LEGEND,
        *(f"Not for this job: {name}: {why}" for name, why in plan.refused.items()),
        "",
        *_said_recommendation(plan),
    ]  # fmt: skip
    # Tables and flags to paste stay as they are.
    texts = {_LEGEND, *parts[-3:]}
    return "\n".join(textwrap.fill(p, _WIDTH, subsequent_indent="  ") if p in texts else p
                     for p in parts)  # fmt: skip


def _said_job(job: Job) -> str:
    virtual = job.num_virtual_stages_per_pipeline_rank
    return (
        f"{job.pipeline_model_parallel_size} stages"
        + (f" of {virtual} chunks" if virtual > 1 else "")
        + f", {job.micro_batches} micro-batches of {job.micro_batch_tokens:,} tokens a step, "
        f"{job.flops_a_token / 1e9:,.3g} GFLOP a token, {job.distributed_backend}."
    )


def _said_links(plan: Plan) -> list[str]:
    links = [_said_link(link) for link in plan.machine.links]
    if len(set(links)) == 1:
        return [f"{len(links)} links: {links[0]}"]
    return [f"Link of stages {a} and {b}: {said}"
            for (a, b, _), said in zip(_ends(plan), links, strict=True)]  # fmt: skip


def _ends(plan: Plan) -> list[tuple[int, int, Link]]:
    processes = plan.job.pipeline_model_parallel_size
    return [(p, (p + 1) % processes, link) for p, link in enumerate(plan.machine.links)]


def _said_link(link: Link) -> str:
    ways = [
        f"{_digits(way.bits_a_second / 1e6)} Mbit/s, {way.latency * 1e3:.3g} ms"
        for way in (link.onward, link.back)
    ]
    return ways[0] if ways[0] == ways[1] else f"{ways[0]}; back {ways[1]}"


def _digits(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.3g}" if number < 100 else f"{number:,.0f}"


def _cells(prediction: Prediction, plain: Prediction) -> list[str]:
    gap = prediction.setting.gap
    return [
        prediction.setting.name,
        "–" if gap is None else f"{gap:+.2f}%",
        f"{prediction.ratio:.2f}×",
        _digits(prediction.seconds),
        f"{prediction.tokens_per_second:,.0f}",
        f"{prediction.course.bubble:,.0%}",
        f"{plain.seconds / prediction.seconds:.2f}×",
        prediction.bottleneck,
    ]


def _said_recommendation(plan: Plan) -> list[str]:
    advice = plan.recommendation
    prediction = advice.prediction
    lines = [f"Recommended for a gap of at most {advice.budget:g}%:"]
    if advice.measured is None:
        lines.append(
            "  plain Megatron, without --mapl-rank: no setting within the budget makes the step "
            f"shorter by more than {TOLERANCE:.0%}."
        )
    else:
        speed_up = plan.predictions[0].seconds / prediction.seconds
        lines += [
            f"  {advice.command_line}",
            *_said_boundaries(prediction),
            f"  As {advice.measured.name}: gap {advice.measured.gap:+.2f}%, step "
            f"{_digits(prediction.seconds)} s, {prediction.tokens_per_second:,.0f} tokens/s, "
            f"{speed_up:.2f}× as fast as uncompressed, {prediction.ratio:.2f}× fewer bytes. "
            f"It adds at most {added_bytes(prediction) / 2**30:,.2f} GiB to a device's memory.",
        ]
    return [*lines, *_said_gaps(plan)]


def _said_gaps(plan: Plan) -> list[str]:
    """Which measurement the gaps come from, and what speaks against it."""
    gaps = plan.gaps
    text = (
        f"Gaps are those of {gaps.path.name}: {gaps.tokens / 1e6:,.1f} M tokens, d = "
        f"{gaps.hidden_size}, {gaps.stages} stages, taken to be the same at the same r/d. Yours "
        "will differ; those of short trainings are larger."
    )
    if gaps.shorter:
        text += f" {gaps.shorter} rows of shorter trainings are left out."
    if plan.job.chunks > gaps.stages:
        text += f" Your {plan.job.chunks} stages are more than were measured and may lose more."
    return ["", text]


def _said_boundaries(prediction: Prediction) -> list[str]:
    """Neighbours that are alike in one line."""
    settled = prediction.plan
    assert settled is not None, "it has a setting of MAPL"
    each = [
        f"rank {rank}, {forward} forward, {backward} back"
        if rank
        else "uncompressed, which costs next to nothing"
        for rank, forward, backward in zip(
            settled.ranks, settled.forward_codecs, settled.backward_codecs, strict=True
        )
    ]
    lines, number = [], 0
    for said, alike in groupby(each):
        last = number + len(list(alike)) - 1
        which = f"boundary {number}" if last == number else f"boundaries {number} to {last}"
        lines.append(f"  {which}: {said}")
        number = last + 1
    return lines


def to_json(plan: Plan) -> dict[str, Any]:
    """All figures, of the settings that are beaten by others too."""
    advice = plan.recommendation
    settled = advice.plan
    return {
        "job": vars(plan.job) | {"flops_a_token": plan.job.flops_a_token},
        "links": [
            {"from": one, "to": other, "mbit": link.onward.bits_a_second / 1e6,
             "latency_ms": link.onward.latency * 1e3, "mbit_back": link.back.bits_a_second / 1e6,
             "latency_back_ms": link.back.latency * 1e3}
            for one, other, link in _ends(plan)
        ],
        "device_flops": plan.machine.flops,
        "device_speed": plan.speed,
        "gaps": {"file": str(plan.gaps.path), "tokens": plan.gaps.tokens,
                 "hidden_size": plan.gaps.hidden_size, "stages": plan.gaps.stages,
                 "ignored": plan.gaps.ignored},
        "refused": plan.refused,
        "settings": [_figures(prediction) for prediction in plan.predictions],
        "recommendation": {
            "max_gap": advice.budget,
            "measured_as": None if advice.measured is None else advice.measured.name,
            "boundaries": [] if settled is None else [
                {"rank": rank, "forward_codec": forward, "backward_codec": backward}
                for rank, forward, backward in zip(
                    settled.ranks, settled.forward_codecs, settled.backward_codecs, strict=True)
            ],
            **_figures(advice.prediction),
            "flags": advice.command_line,
            "added_memory_bytes": added_bytes(advice.prediction),
        },
    }  # fmt: skip


def _figures(prediction: Prediction) -> dict[str, Any]:
    computation, bubble, network = prediction.shares
    return {
        "setting": prediction.setting.name,
        "flags": prediction.setting.command_line,
        "gap": prediction.setting.gap,
        "ratio": prediction.ratio,
        "step_seconds": prediction.seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "bubble": prediction.course.bubble,
        "seconds": {"computation": computation, "bubble": bubble, "network": network},
        "sent_bytes": prediction.sent,
        "bottleneck": prediction.bottleneck,
    }
