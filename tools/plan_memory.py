# SPDX-License-Identifier: Apache-2.0
"""What the boundaries of a planned job add to a device's memory, by `mapl/memory.py`."""

from mapl.anchors import default_buckets
from mapl.memory import Stage, added, in_flight
from plan_job import Job
from plan_prediction import Prediction

_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

#: Parameter, gradient and Adam's two moments, all in fp32.
_FP32_ADAM = 16


def added_bytes(prediction: Prediction) -> int:
    """At most, on the device to which they add most; 0 for plain Megatron.

    Each table of a full or static anchor counts as one of rank d. The optimizer's state is taken
    not to be spread over replicas.
    """
    plan, config, job = prediction.plan, prediction.setting.config, prediction.job
    if plan is None or config is None:
        return 0
    anchor_rank = {"none": 0, "static": job.hidden_size, "full": job.hidden_size}.get(
        config.anchor, plan.anchor_rank
    )
    buckets = 0
    if config.anchor == "bigram":
        buckets = config.anchor_buckets or default_buckets(job.vocab_size)
    mixed = job.dtype != "fp32"
    processes, chunks = job.pipeline_model_parallel_size, job.num_virtual_stages_per_pipeline_rank
    return max(
        sum(
            added(
                Stage(
                    hidden_size=job.hidden_size,
                    rank=max(plan.ranks),
                    anchor_rank=anchor_rank,
                    vocab_size=job.padded_vocab_size,
                    tokens=_tokens(job),
                    sending=chunks - (process == processes - 1),
                    receiving=chunks - (process == 0),
                    in_flight=in_flight(processes, process, job.micro_batches, chunks),
                    ahead=prediction.step.receive_ahead,
                    itemsize=_ITEMSIZE[job.dtype],
                    buckets=buckets,
                    sequence_parallel=job.sequence_parallel,
                    **({} if mixed else {"table_bytes": _FP32_ADAM}),
                )
            ).values()
        )
        for process in range(processes)
    )


def _tokens(job: Job) -> int:
    """Of a micro-batch that one tensor-parallel rank holds at a boundary."""
    ranks = job.tensor_model_parallel_size if job.sequence_parallel else 1
    return job.micro_batch_tokens // ranks
