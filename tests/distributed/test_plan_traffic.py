# SPDX-License-Identifier: Apache-2.0
"""plan.py counts the bytes that a job reports to have sent, boundary by boundary."""

import pytest

import plan_settings
from cluster import Cluster
from layouts import LAYOUTS
from mapl.plan import plan_boundaries
from mapl.traffic import KINDS
from plan_job import Job
from plan_traffic import boundaries, plain_boundaries

STEPS = 4

CASES = {
    "one of three compressed": (
        "pp4",
        "--mapl-rank 0 16 0 --mapl-anchor factorized --mapl-forward-codec int8 "
        "--mapl-backward-codec int4",
    ),
    "ranks and codecs of their own": (
        "pp4",
        "--mapl-rank 8 16 24 --mapl-anchor bigram --mapl-forward-codec int8 rvq pipeline "
        "--mapl-backward-codec int8 pipeline topk --mapl-rvq-sync full --mapl-topk 3",
    ),
    "virtual stages, the link back uncompressed": (
        "pp2-vpp2-overlapped",
        "--mapl-rank 16 0 16 --mapl-forward-codec int8 --mapl-backward-codec int4",
    ),
    "without a projector, by two ranks each": (
        "tp2-pp2",
        "--mapl-rank 64 --mapl-projector none --mapl-anchor none --mapl-forward-codec int8 "
        "--mapl-backward-codec int8",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_each_boundary(cluster: Cluster, name: str) -> None:
    layout, flags = CASES[name]
    command = LAYOUTS[layout].command(flags)
    result = cluster.run_once(LAYOUTS[layout].world_size, command)
    split = 2 if layout == "tp2-pp2" else 1
    job = Job(
        num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=256,
        micro_batch_size=2, global_batch_size=LAYOUTS[layout].samples, swiglu=True, dtype="fp32",
        pipeline_model_parallel_size=LAYOUTS[layout].world_size // split,
        tensor_model_parallel_size=split,
        num_virtual_stages_per_pipeline_rank=2 if "vpp2" in layout else 1,
    )  # fmt: skip
    config = plan_settings.Setting(name, plan_settings.read(command)).config
    assert config is not None
    settled = plan_boundaries(
        config, hidden_size=64, boundaries=job.boundaries, shards=split
    )  # fmt: skip
    planned = boundaries(job, config, settled)
    reported = result.traffic["boundaries"]
    assert len(planned) == len(reported) == job.boundaries
    for ours, plain, entry in zip(planned, plain_boundaries(job), reported, strict=True):
        sent = {key: _bytes(value) for key, value in entry.items() if isinstance(value, dict)}
        # Of a micro-batch each of the tensor-parallel ranks sends one payload.
        micro_batches = {key: entry[key]["payloads"] / split for key in ("forward", "backward")}
        assert micro_batches["backward"] == STEPS * job.micro_batches
        for key in ("forward", "backward"):
            assert sent[key] / micro_batches[key] == getattr(ours, key)
        once = sum(size for key, size in sent.items() if key not in ("forward", "backward"))
        assert once == STEPS * (ours.step_onward + ours.step_back)
        uncompressed = plain.forward * micro_batches["forward"]
        assert entry["uncompressed"] == uncompressed + plain.backward * micro_batches["backward"]


def _bytes(entry: dict[str, int]) -> int:
    return sum(entry[kind] for kind in KINDS)
