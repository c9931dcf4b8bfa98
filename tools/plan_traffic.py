# SPDX-License-Identifier: Apache-2.0
"""What each boundary of a planned job sends, by the project's own accounting."""

from dataclasses import replace
from functools import cache
from typing import Any

import traffic_budget
from mapl.codecs import CodecSettings
from mapl.config import LEARNED, MaplConfig
from mapl.plan import BoundaryPlan
from mapl.traffic import KINDS
from pipeline_step import Boundary
from plan_job import Job


def boundaries(job: Job, config: MaplConfig, plan: BoundaryPlan) -> tuple[Boundary, ...]:
    """Of a job with MAPL; uncompressed boundaries are sent as payloads too.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    return tuple(_boundary(job, config, plan, number) for number in range(job.boundaries))


def _boundary(job: Job, config: MaplConfig, plan: BoundaryPlan, number: int) -> Boundary:
    compressed = bool(plan.ranks[number])
    virtual = job.num_virtual_stages_per_pipeline_rank > 1
    what = replace(
        _plain_job(job),
        rank=plan.width(number),
        forward_codec=plan.forward_codecs[number],
        backward_codec=plan.backward_codecs[number],
        projector_exchange=config.projector_exchange,
        no_tensor_parallel_split=not config.tensor_parallel_split,
        token_ids=config.anchor != "none" and (virtual or any(plan.ranks[number:])),
        exchanges=compressed and config.projector in LEARNED,
        codecs=config.codec_settings,
    )
    sent = _sent(what)
    projector = sent.get("projector", 0) / 2  # each side sends its term
    return Boundary(
        forward=sent["forward"],
        backward=sent["backward"],
        step_onward=projector + sent.get("forward_codebook", 0),
        step_back=projector + sent.get("backward_codebook", 0),
    )


def plain_boundaries(job: Job) -> tuple[Boundary, ...]:
    """Of plain Megatron."""
    size = traffic_budget.budget(_plain_job(job))["total"]["uncompressed"] / 2
    return (Boundary(size, size),) * job.boundaries


def _plain_job(job: Job) -> traffic_budget.Job:
    """One micro-batch over one boundary."""
    return traffic_budget.Job(
        hidden_size=job.hidden_size,
        rank=job.hidden_size,
        vocab_size=job.padded_vocab_size,
        micro_batch_tokens=job.micro_batch_tokens,
        step_tokens=job.micro_batch_tokens,
        dtype=job.dtype,
        tensor_model_parallel_size=job.tensor_model_parallel_size,
        sequence_parallel=job.sequence_parallel,
        forward_codec="pipeline",
        backward_codec="pipeline",
        codecs=CodecSettings(),
    )


@cache
def _sent(what: traffic_budget.Job) -> dict[str, int]:
    """Bytes by direction, of all tensor-parallel ranks together."""
    report: dict[str, Any] = traffic_budget.budget(what)["boundaries"][0]
    return {
        direction: sum(entry[kind] for kind in KINDS)
        for direction, entry in report.items()
        if isinstance(entry, dict)
    }
