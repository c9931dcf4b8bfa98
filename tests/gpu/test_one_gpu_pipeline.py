# SPDX-License-Identifier: Apache-2.0
"""Pipelines on one GPU over gloo, staged through pinned memory: they train, and exactly."""

import pytest
import torch

from jobs import HIDDEN, ON_CPU, PP2, PP4, VPP, assert_sides_equal, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not ON_CPU, reason="needs a GPU")

GLOO = "--distributed-backend gloo"
PP4_GLOO = f"{PP4} {GLOO}"
SQUARE = f"--mapl-rank {HIDDEN} --mapl-anchor none"
INT8 = "--mapl-rank 16 --mapl-forward-codec int8 --mapl-backward-codec int8 --bf16"
RVQ = "--mapl-rank 16 --mapl-forward-codec rvq --mapl-rvq-codes 16 --mapl-backward-codec int4"


def test_uncompressed_stages_train() -> None:
    result = run(4, PP4_GLOO)
    assert result.losses[-1] < result.losses[0] - 0.05
    if not ON_CPU:
        assert "processes share" in result.log


def test_a_square_projector_gives_the_same_losses() -> None:
    plain, mapl = run(4, PP4_GLOO), run(4, f"{PP4_GLOO} {SQUARE}")
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-5)
    assert mapl.validation == pytest.approx(plain.validation, rel=1e-5)


def test_virtual_stages() -> None:
    """Two processes: each is the other's next stage and its previous one, transfers overlap."""
    layout = f"{PP2} {VPP} {GLOO}"
    plain, mapl = run(2, layout), run(2, f"{layout} {SQUARE}")
    assert plain.losses[-1] < plain.losses[0] - 0.05
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("sharded", ["", "--sequence-parallel"])
def test_tensor_parallel(sharded: str) -> None:
    layout = f"{PP2} --tensor-model-parallel-size 2 {sharded} {GLOO}"
    plain, mapl = run(4, layout), run(4, f"{layout} {SQUARE}")
    assert plain.losses[-1] < plain.losses[0] - 0.05
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-5)


def test_rvq_trains() -> None:
    result = run(4, f"{PP4_GLOO} {RVQ} --bf16")
    assert result.losses[-1] < result.losses[0] - 0.02
    assert_sides_equal(result, 3)


def test_timing_changes_no_bit() -> None:
    """Over slow links, not received ahead, and with freed memory spoilt around every payload."""
    job = f"{PP4_GLOO} {INT8} --global-batch-size 16"  # enough for freed memory to be used again
    straight = run(4, job, deterministic=True)
    assert straight.losses[-1] < straight.losses[0] - 0.02
    assert_sides_equal(straight, 3)
    slow = run(
        4,
        f"{job} --mapl-emulate-latency 3 --mapl-receive-ahead 0",
        deterministic=True,
        around_payloads="spoil",
    )
    assert slow.losses == straight.losses
