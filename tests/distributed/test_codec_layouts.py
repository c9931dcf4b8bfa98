# SPDX-License-Identifier: Apache-2.0
"""Every codec in every layout: both ends of a boundary stay bitwise equal, and the model learns."""

import pytest
import torch

from cluster import Cluster, Result
from layouts import LAYOUTS
from test_layouts import RANK, assert_sides_equal

#: Forward and backward codec.
PAIRS = {
    "rvq-int4": ("rvq", "int4"),
    "int8-rvq": ("int8", "rvq"),
    "fp8-fp8": ("fp8", "fp8"),
    "int4-int8": ("int4", "int8"),
    "topk-topk": ("topk", "topk"),
    "pipeline-lowrank": ("pipeline", "lowrank"),
}
#: A codec with a codebook, forward, and one that rounds at random, backward, in each layout; the
#: others where they meet something new: virtual stages, splits, replicas, casts, loss scales.
RUNS = [
    *((name, "rvq-int4") for name in LAYOUTS),
    *((name, "int8-rvq") for name in ("pp4", "pp2-vpp2-overlapped", "tp2-pp2", "tp2-sp-pp2")),
    *((name, "int8-rvq") for name in ("pp2-dp2-distributed-optimizer-overlaps", "bf16", "fp16")),
    *((name, "fp8-fp8") for name in ("pp2-vpp2-overlapped", "tp2-pp2", "bf16", "fp16")),
    ("pp4", "int4-int8"),
    *((name, "topk-topk") for name in ("pp2-vpp2-overlapped", "tp2-pp2", "bf16", "fp16")),
    *((name, "pipeline-lowrank") for name in ("pp2-vpp2-overlapped", "tp2-pp2", "tp2-sp-pp2")),
    *((name, "pipeline-lowrank") for name in ("pp2-dp2-distributed-optimizer", "bf16", "fp16")),
]


def flags(forward: str, backward: str, *more: str) -> str:
    """A job's `--mapl-*` flags."""
    codes = "--mapl-rvq-codes 16" if "rvq" in (forward, backward) else ""
    kept = "--mapl-topk 6" if "topk" in (forward, backward) else ""
    columns = "--mapl-lowrank-q 4" if "lowrank" in (forward, backward) else ""
    return " ".join(
        (f"--mapl-rank {RANK} --mapl-forward-codec {forward} --mapl-backward-codec {backward}",
         codes, kept, columns, *more)
    )  # fmt: skip


def assert_codebooks_equal(result: Result, boundaries: int, copies_each: int) -> None:
    """Every process that holds a codebook holds the same, and it is not the one of the start."""
    held: dict[int, list[list[torch.Tensor]]] = {}
    for record in result.records:
        for (boundary, side), codebooks in record["codebooks"].items():
            held.setdefault(boundary, []).append(codebooks)
            started = record["start_codebooks"][boundary, side]
            for now, start in zip(codebooks, started, strict=True):
                assert not torch.equal(now, start)
    assert sorted(held) == list(range(boundaries))
    for copies in held.values():
        assert len(copies) == copies_each
        for copy in copies:
            assert len(copy) == len(copies[0]) > 0
            for one, first in zip(copy, copies[0], strict=True):
                assert torch.equal(one, first)
                assert one.isfinite().all() and one.abs().max() > 0


def assert_one_q_each(result: Result, boundaries: int, copies_each: int) -> None:
    """Every process that sends gradients over a boundary goes on with the same Q."""
    held: dict[int, list[torch.Tensor]] = {}
    for record in result.records:
        for boundary, q in record["lowrank"].items():
            held.setdefault(boundary, []).append(q)
    assert sorted(held) == list(range(boundaries))
    for copies in held.values():
        assert len(copies) == copies_each
        assert all(torch.equal(copy, copies[0]) and copy.isfinite().all() for copy in copies)


@pytest.mark.parametrize(("name", "pair"), RUNS)
def test_codecs_in_every_layout(cluster: Cluster, name: str, pair: str) -> None:
    layout = LAYOUTS[name]
    result = cluster.run(layout.world_size, layout.command(flags(*PAIRS[pair])))
    replicas, boundaries = layout.processes_a_stage, layout.boundaries
    assert_sides_equal(result, boundaries, 2 * replicas)
    if "rvq" in PAIRS[pair]:
        assert_codebooks_equal(result, boundaries, 2 * replicas)
        assert all(line["codebooks"] for line in result.metrics)
    if "lowrank" in PAIRS[pair]:
        assert_one_q_each(result, boundaries, replicas)
    assert result.losses[-1] < result.losses[0] - 0.02
    total = result.traffic["total"]
    assert bool(total["scales"]) == bool({*PAIRS[pair]} - {"topk", "pipeline", "lowrank"})
    assert bool(total["indices"]) == ("topk" in PAIRS[pair])
    assert bool(total["codebook"]) == ("rvq" in PAIRS[pair])


@pytest.mark.parametrize("sync", ["full", "frozen"])
def test_codebooks_that_are_not_streamed(cluster: Cluster, sync: str) -> None:
    """Whole codebooks cross after steps 1, 2 and 4, with `full` after the third of four too."""
    layout = LAYOUTS["pp2-dp2"]
    result = cluster.run(4, layout.command(flags("rvq", "rvq", f"--mapl-rvq-sync {sync}")))
    assert_codebooks_equal(result, 1, 4)
    (boundary,) = result.traffic["boundaries"]
    for direction in ("forward_codebook", "backward_codebook"):
        assert boundary[direction]["payloads"] == {"full": 4, "frozen": 3}[sync] * 2
    assert not boundary["forward"]["codebook"]
