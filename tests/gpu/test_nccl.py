# SPDX-License-Identifier: Apache-2.0
"""Pipelines over NCCL on several GPUs: the same losses, equal sides, and right lifetimes."""

import pytest
import torch

from jobs import HIDDEN, ON_CPU, PP2, VPP, assert_sides_equal, run

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2 and not ON_CPU, reason="needs two GPUs"
)

LAYOUTS = {"pp2": PP2, "pp2-vpp2": f"{PP2} {VPP}"}
BOUNDARIES = {"pp2": 1, "pp2-vpp2": 3}
SQUARE = f"--mapl-rank {HIDDEN} --mapl-anchor none"

#: Many small micro-batches, whose kernels take less time than the host needs to start them.
MANY = "--micro-batch-size 1 --global-batch-size 64 --train-iters 6 --bf16"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_square_projector_gives_the_same_losses(layout: str) -> None:
    plain, mapl = run(2, LAYOUTS[layout]), run(2, f"{LAYOUTS[layout]} {SQUARE}")
    assert plain.losses[-1] < plain.losses[0] - 0.05
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-5)
    assert mapl.validation == pytest.approx(plain.validation, rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "forward", "backward"),
    [
        ("pp2-vpp2", "pipeline", "pipeline"),
        ("pp2", "int8", "fp8"),
        ("pp2-vpp2", "int4", "int8"),
        ("pp2-vpp2", "fp8", "int4"),
        ("pp2-vpp2", "rvq", "rvq"),
    ],
)
def test_sides_stay_equal(layout: str, forward: str, backward: str) -> None:
    codecs = f"--mapl-forward-codec {forward} --mapl-backward-codec {backward}"
    codecs += " --mapl-rvq-codes 16" if "rvq" in codecs else ""
    result = run(2, f"{LAYOUTS[layout]} --mapl-rank 16 {codecs} --bf16")
    assert result.losses[-1] < result.losses[0] - 0.02
    assert_sides_equal(result, BOUNDARIES[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lifetimes(layout: str) -> None:
    """Freed memory is spoilt at once, and nothing changes: not by a bit, not against a run in
    which the host is never ahead of the device where payloads are packed and unpacked."""
    codecs = "--mapl-forward-codec int8 --mapl-backward-codec int4"
    job = f"{LAYOUTS[layout]} {MANY} --mapl-rank 16 {codecs}"
    # CUDA_LAUNCH_BLOCKING would wait for receives whose senders wait for this process.
    waiting = run(2, job, deterministic=True, around_payloads="wait")
    pressed = run(2, job, deterministic=True, around_payloads="spoil")
    assert pressed.losses == waiting.losses
    assert torch.tensor(pressed.losses).isfinite().all()
    assert_sides_equal(pressed, BOUNDARIES[layout])
