# SPDX-License-Identifier: Apache-2.0
"""What is not latents is at most 1 % of the traffic at realistic sizes."""

import pytest
import torch

from traffic_budget import budget


@pytest.mark.parametrize("vocab_size", [32000, 128256])
@pytest.mark.parametrize(("hidden_size", "rank"), [(1024, 128), (2048, 128), (2048, 256)])
def test_overhead(hidden_size: int, rank: int, vocab_size: int) -> None:
    """The paper's batch of 512 · 2048 tokens, in micro-batches of 8 · 2048."""
    report = budget(
        hidden_size=hidden_size,
        rank=rank,
        vocab_size=vocab_size,
        micro_batch_tokens=8 * 2048,
        step_tokens=512 * 2048,
        dtype=torch.bfloat16,
    )
    assert 0 < report["total"]["overhead"] <= 0.01
    assert report["total"]["ratio"] == pytest.approx(hidden_size / rank, rel=0.01)


def test_tensor_parallel_ranks_each_send_the_projector() -> None:
    sizes = {
        "hidden_size": 64,
        "rank": 8,
        "vocab_size": 256,
        "micro_batch_tokens": 64,
        "step_tokens": 128,
        "dtype": torch.bfloat16,
    }
    one = budget(**sizes)["total"]
    two = budget(**sizes, tensor_model_parallel_size=2, sequence_parallel=True)["total"]
    assert two["latents"] == one["latents"] and two["projector"] == 2 * one["projector"]
    doubled = budget(**sizes, tensor_model_parallel_size=2)["total"]
    assert doubled["latents"] == 2 * one["latents"]


def test_micro_batches_that_do_not_fill_a_step() -> None:
    with pytest.raises(ValueError, match="--step-tokens 100 is no multiple"):
        budget(
            hidden_size=8,
            rank=2,
            vocab_size=9,
            micro_batch_tokens=64,
            step_tokens=100,
            dtype=torch.bfloat16,
        )
