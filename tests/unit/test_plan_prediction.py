# SPDX-License-Identifier: Apache-2.0
"""What a planned step consists of, and what holds it up."""

import dataclasses
import json
import re

import pytest

import plan
import plan_links
import plan_settings
from pipeline_step import Direction, Link
from plan_job import Job
from plan_memory import added_bytes
from plan_prediction import Machine, predict
from plan_settings import Setting
from plan_traffic import boundaries
from tests.unit.plan_cases import GAPS, JOB, machine


def test_memory_is_that_of_the_formula() -> None:
    """README's cluster job: 168 M parameters of tables on a GPU, 18 bytes each, and more."""
    job = dataclasses.replace(
        JOB, hidden_size=4096, vocab_size=32000, tensor_model_parallel_size=8,
        pipeline_model_parallel_size=8, sequence_parallel=True, seq_length=4096,
    )  # fmt: skip
    assert added_bytes(predict(job, Setting("", {}), machine(100, job=job))) == 0
    sizes = {}
    for anchor in ("bigram", "factorized", "none"):
        flags = {"rank": [1280], "anchor": anchor}
        sizes[anchor] = added_bytes(predict(job, Setting("", flags), machine(100, job=job)))
    tables = (32768 + 131072) * 1024
    assert 0 < sizes["bigram"] - sizes["factorized"] - 131072 * 1024 * 24 < 2**28
    assert sizes["bigram"] > tables * 18 > sizes["factorized"] > 32768 * 1024 * 18
    assert sizes["none"] < sizes["factorized"]


def test_what_holds_a_step_up_is_named() -> None:
    plain = Setting("uncompressed", {})
    slow = predict(JOB, plain, machine(1e6, 10, 1e6))
    assert slow.bottleneck.startswith("bandwidth from stage ")
    assert re.search(r"from stage (1 to 2|2 to 1), \d+% in use", slow.bottleneck)
    assert predict(JOB, plain, machine(10)).bottleneck.startswith("bandwidth of the links")
    # The last stage has the output layer too.
    assert predict(JOB, plain, machine(1e9)).bottleneck == "computation of stage 3"
    one = Machine(1e14, machine(1e9).links, devices=1)
    assert predict(JOB, plain, one).bottleneck == "computation"
    far = plan_links.given([1e9], [0.0, 500.0, 0.0], 3)
    assert predict(JOB, plain, Machine(1e14, tuple(far))).bottleneck == (
        "latency from stage 1 to 2"
    )
    everywhere = plan_links.given([1e9], [500.0], 3)
    assert predict(JOB, plain, Machine(1e14, tuple(everywhere))).bottleneck == (
        "latency of the links"
    )


def test_a_fast_network_leaves_the_bubble() -> None:
    """Equal stages: (P − 1) / m."""
    job = dataclasses.replace(
        JOB, vocab_size=1, make_vocab_size_divisible_by=1, pipeline_model_parallel_size=4
    )
    free = Direction(float("inf"), 0.0)
    prediction = predict(job, Setting("uncompressed", {}), Machine(1e12, (Link(free, free),) * 3))
    assert prediction.course.bubble == pytest.approx(3 / 16, rel=1e-3)
    floor = job.flops_a_token * job.step_tokens / 4 / 1e12
    assert prediction.seconds == pytest.approx(floor * (1 + 3 / 16), rel=1e-3)


def test_recomputation_adds_a_forward_pass_of_the_layers() -> None:
    job = dataclasses.replace(JOB, recompute_granularity="full")
    for chunk in range(4):
        forward, backward = JOB.chunk_flops(chunk)
        again = JOB.layers(chunk) * JOB.layer_flops * JOB.micro_batch_tokens / 3
        assert job.chunk_flops(chunk) == (forward, pytest.approx(backward + again))


def test_measured_ratios_are_those_that_are_counted() -> None:
    """docs/search.md counts an evaluation too, which sends forward alone."""
    job = Job(
        num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024, vocab_size=32000,
        micro_batch_size=32, global_batch_size=64, pipeline_model_parallel_size=4,
    )  # fmt: skip
    rows = json.loads(plan.GAPS.read_text())
    ratios = {row["setting"]: row["ratio"] for row in rows}
    for setting in GAPS.carried_over(768):
        if ratios[setting.name] is not None:
            counted = predict(job, setting, machine(100)).ratio
            assert counted == pytest.approx(ratios[setting.name], rel=0.015), setting.name


def test_bytes_count_for_the_whole_step() -> None:
    setting = Setting("s", plan_settings.read("--mapl-rank 64".split()))
    prediction = predict(JOB, setting, machine(100))
    assert setting.config is not None and prediction.plan is not None
    each = boundaries(JOB, setting.config, prediction.plan)[0]
    once = each.step_onward + each.step_back
    assert once > 2 * 1024 * 64 * 2
    assert prediction.sent == 3 * (16 * (each.forward + each.backward) + once)
