# SPDX-License-Identifier: Apache-2.0
"""What is not latents is at most 1 % of the traffic at realistic sizes."""

import dataclasses

import pytest

from mapl.codecs import CodecSettings
from mapl.traffic import KINDS
from traffic_budget import Job, budget

SMALL = Job(hidden_size=64, rank=8, vocab_size=256, micro_batch_tokens=64, step_tokens=128)


@pytest.mark.parametrize("vocab_size", [32000, 128256])
@pytest.mark.parametrize(("hidden_size", "rank"), [(1024, 128), (2048, 128), (2048, 256)])
def test_overhead(hidden_size: int, rank: int, vocab_size: int) -> None:
    """The paper's batch of 512 · 2048 tokens, in micro-batches of 8 · 2048."""
    job = Job(
        hidden_size=hidden_size,
        rank=rank,
        vocab_size=vocab_size,
        micro_batch_tokens=8 * 2048,
        step_tokens=512 * 2048,
        forward_codec="pipeline",
        backward_codec="pipeline",
    )
    report = budget(job)
    assert 0 < report["total"]["overhead"] <= 0.01
    assert report["total"]["ratio"] == pytest.approx(hidden_size / rank, rel=0.01)


def test_tensor_parallel_ranks_send_each_byte_once() -> None:
    one = budget(SMALL)["total"]
    with_tp = dataclasses.replace(SMALL, tensor_model_parallel_size=2)
    for job in (with_tp, dataclasses.replace(with_tp, sequence_parallel=True)):
        two = budget(job)["total"]
        for kind in ("latents", "ids", "projector"):
            assert two[kind] == one[kind], kind
    split = budget(with_tp)["total"]
    whole = budget(dataclasses.replace(with_tp, no_tensor_parallel_split=True))["total"]
    assert whole["latents"] == 2 * one["latents"]
    assert split["unsplit"] == whole["unsplit"]
    # Plain Megatron sends each activation from both ranks.
    assert split["uncompressed"] == 2 * one["uncompressed"]


def test_replicas_and_bf16_make_the_exchange_cheaper() -> None:
    one = budget(SMALL)["total"]
    four = budget(dataclasses.replace(SMALL, replicas=4))["total"]
    assert four["projector"] == one["projector"]
    assert four["split_factor"] > 1.0
    twice = budget(dataclasses.replace(SMALL, projector_exchange="fp32"))["total"]
    assert twice["projector"] == 2 * one["projector"]


@pytest.mark.parametrize(("codec", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4), ("rvq", 4)])
def test_codecs(codec: str, bits: int) -> None:
    job = dataclasses.replace(SMALL, forward_codec=codec, backward_codec=codec)
    total = budget(job)["total"]
    assert total["latents"] == 2 * SMALL.step_tokens * SMALL.rank * bits // 8
    assert total["scales"] == 2 * SMALL.step_tokens * 2  # bf16, one for each token
    assert bool(total["codebook"]) == (codec == "rvq")


def test_topk_counts_values_and_their_places() -> None:
    codecs = CodecSettings(topk=3)
    job = dataclasses.replace(SMALL, forward_codec="topk", backward_codec="topk", codecs=codecs)
    total = budget(job)["total"]
    assert total["latents"] == total["indices"] == 2 * SMALL.step_tokens * 3 * 2
    assert total["sent"] == sum(total[kind] for kind in KINDS)
    assert total["overhead"] > 0.5


def test_lowrank_counts_both_matrices_of_each_process() -> None:
    codecs = CodecSettings(lowrank_q=4)
    job = dataclasses.replace(SMALL, backward_codec="lowrank", codecs=codecs)
    micro_batches = SMALL.step_tokens // SMALL.micro_batch_tokens
    for ranks in (1, 2):
        split = dataclasses.replace(job, tensor_model_parallel_size=ranks)
        backward = budget(split)["boundaries"][0]["backward"]
        numbers = SMALL.micro_batch_tokens + ranks * SMALL.rank
        assert backward["latents"] == micro_batches * numbers * 4 * 2
    with pytest.raises(ValueError, match="--mapl-forward-codec lowrank: it is for gradients"):
        budget(dataclasses.replace(job, forward_codec="lowrank"))
    small = dataclasses.replace(job, micro_batch_tokens=2)
    with pytest.raises(ValueError, match="--mapl-lowrank-q 4 exceeds the 2 tokens"):
        budget(small)


def test_whole_codebooks_are_counted_where_they_cross_after_each_step() -> None:
    job = dataclasses.replace(SMALL, forward_codec="rvq", replicas=2)
    codecs = CodecSettings(rvq_groups=2, rvq_rounds=3, rvq_codes=16, rvq_sync="full")
    full = budget(dataclasses.replace(job, codecs=codecs))["total"]
    frozen = dataclasses.replace(codecs, rvq_sync="frozen")
    assert full["codebook"] == 2 * 3 * 16 * 4 * 2  # [G, R, K, v] in bf16
    assert budget(dataclasses.replace(job, codecs=frozen))["total"]["codebook"] == 0


def test_micro_batches_that_do_not_fill_a_step() -> None:
    with pytest.raises(ValueError, match="--step-tokens 100 is no multiple"):
        budget(dataclasses.replace(SMALL, step_tokens=100))
