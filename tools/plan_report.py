# SPDX-License-Identifier: Apache-2.0
"""A plan as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline_step import Link
from plan_advice import said_recommendation
from plan_gaps import Gaps
from plan_job import Job
from plan_prediction import Machine, Prediction
from plan_recommendation import TOLERANCE, Recommendation
from plan_text import digits, wrapped
from text_table import columns

_NAMES = ("setting", "gap", "ratio", "step s", "tokens/s", "bubble", "faster", "bottleneck")

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

    @property
    def ends(self) -> list[tuple[int, int, Link]]:
        """The links, each with the stages that it connects."""
        processes = self.job.pipeline_model_parallel_size
        return [(p, (p + 1) % processes, link) for p, link in enumerate(self.machine.links)]

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
    lines = [
        _said_job(job),
        *_said_links(plan),
        f"Devices: {plan.machine.flops / 1e12:,.4g} TFLOP/s each, {plan.speed}.",
        "",
        columns(_NAMES, cells, markdown=False),
        "",
        *([f"{left_out} measured settings lose more and are no faster than one of these."]
          if left_out else []),
        wrapped(_LEGEND),
        *(f"Not for this job: {name}: {why}" for name, why in plan.refused.items()),
        "",
        *said_recommendation(plan.recommendation, plan.predictions[0]),
        "",
        _said_gaps(plan),
    ]  # fmt: skip
    return "\n".join(lines)


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
    if len(links) > 1 and len(set(links)) == 1:
        return [f"{len(links)} links: {links[0]}"]
    return [f"Link of stages {a} and {b}: {said}"
            for (a, b, _), said in zip(plan.ends, links, strict=True)]  # fmt: skip


def _said_link(link: Link) -> str:
    ways = [
        f"{digits(way.bits_a_second / 1e6)} Mbit/s, {way.latency * 1e3:.3g} ms"
        for way in (link.onward, link.back)
    ]
    return ways[0] if ways[0] == ways[1] else f"{ways[0]}; back {ways[1]}"


def _cells(prediction: Prediction, plain: Prediction) -> list[str]:
    gap = prediction.setting.gap
    return [
        prediction.setting.name,
        "–" if gap is None else f"{gap:+.2f}%",
        f"{prediction.ratio:.2f}×",
        digits(prediction.seconds),
        f"{prediction.tokens_per_second:,.0f}",
        f"{prediction.course.bubble:,.0%}",
        f"{plain.seconds / prediction.seconds:.2f}×",
        prediction.bottleneck,
    ]


def _said_gaps(plan: Plan) -> str:
    """Which measurement the gaps come from, and what speaks against it."""
    gaps = plan.gaps
    text = (
        f"Gaps are those of {Path(*gaps.path.parts[-2:])}: {gaps.tokens / 1e6:,.1f} M tokens, d = "
        f"{gaps.hidden_size}, {gaps.stages} stages, taken to be the same at the same r/d. Yours "
        "will differ, and change with the length of a training."
    )
    if gaps.shorter:
        text += f" {gaps.shorter} rows of shorter trainings are left out."
    if plan.job.chunks > gaps.stages:
        text += f" Your {plan.job.chunks} stages are more than were measured and may lose more."
    return wrapped(text)
