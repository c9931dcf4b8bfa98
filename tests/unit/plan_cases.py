# SPDX-License-Identifier: Apache-2.0
"""A job, the gaps of the search, and machines to plan for."""

import dataclasses
from pathlib import Path

import plan
import plan_gaps
import plan_links
from plan_job import Job
from plan_prediction import Machine

ROOT = Path(__file__).parent.parent.parent

DOCS = (ROOT / "docs" / "planning.md").read_text()

JOB = Job(
    num_layers=8, hidden_size=1024, num_attention_heads=8, seq_length=1024, vocab_size=32000,
    micro_batch_size=1, global_batch_size=16, pipeline_model_parallel_size=4, swiglu=True,
)  # fmt: skip
VIRTUAL = dataclasses.replace(JOB, num_virtual_stages_per_pipeline_rank=2)
GAPS = plan_gaps.read(plan.GAPS)


def machine(*mbit: float, job: Job = JOB, flops: float = 1e14) -> Machine:
    """With links of these bandwidths, or of one for all."""
    links = plan_links.given(mbit, [1.0], job.links)
    return Machine(flops, tuple(links))
