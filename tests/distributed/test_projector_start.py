# SPDX-License-Identifier: Apache-2.0
"""`--mapl-projector-start-step`: projectors that start from the data's spectrum, one a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import Cluster, Result
from layouts import HIDDEN, LAYOUTS, SEQUENCE, Layout
from mapl.geometry import (
    best_energy,
    leading_directions,
    orthonormal_basis,
    spectrum,
    subspace_energy,
)
from test_layouts import RANK, assert_sides_equal, copies

SAVE = "--save-interval 2 --ckpt-format torch_dist --lr-decay-iters 10 --lr-warmup-iters 1"
MAPL = f"--mapl-rank {RANK}"
START = "--mapl-projector-start-step"
MEASURED = "--mapl-geometry-interval 1"


def assert_the_best_of_each_step(
    result: Result, first: int, boundaries: int, tokens: int, rel: float
) -> None:
    """A of the next step keeps the most of all that was sent, and is as near to A as can be."""
    sent: dict[Any, list[Any]] = {}
    for record in result.records:
        for place, noted in record["sent"].items():
            sent.setdefault(place, []).append(noted)
    assert {boundary for boundary, _ in sent} == {*range(boundaries)}
    for boundary in range(boundaries):
        step = first + boundary
        assert sum(count for count, _, _ in sent[boundary, step]) == tokens
        moment = sum(moment for _, moment, _ in sent[boundary, step])
        best = best_energy(spectrum(moment), RANK)
        ((_, _, old), *_), ((_, _, new), *_) = sent[boundary, step], sent[boundary, step + 1]
        assert all(torch.equal(a, new) for _, _, a in sent[boundary, step + 1])
        assert subspace_energy(moment, new) == pytest.approx(best, rel=rel)
        assert subspace_energy(moment, old) < best - 0.05
        assert_nearest(new, old, 10 * rel)
        v, q = leading_directions(moment, RANK), orthonormal_basis(new)
        assert (v - q @ (q.mT @ v)).abs().max() < 10 * rel


def assert_nearest(new: Tensor, old: Tensor, tolerance: float) -> None:
    """That no other basis of the same span is nearer: newᵀ·old is symmetric and semidefinite."""
    inner = new.double().mT @ old.double()
    assert (inner - inner.mT).abs().max() < tolerance
    assert torch.linalg.eigvalsh(inner).min() > -tolerance


def energy(result: Result) -> list[list[float]]:
    """Of each measured step and each boundary, the part that the projector keeps."""
    return [[e["energy_kept"] for e in line["geometry"]["boundaries"]] for line in result.metrics]


def assert_same_projectors(result: Result, expected: Result) -> None:
    ours, theirs = copies(result), copies(expected)
    assert ours.keys() == theirs.keys()
    for boundary, states in ours.items():
        one, other = states[0]["A"], theirs[boundary][0]["A"]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "more", "boundaries", "copies_each"),
    [
        ("pp2", "", 1, 2),
        ("pp2-vpp2-overlapped", "", 3, 2),
        ("pp4-vpp2", "", 7, 2),
        ("pp2-dp2-distributed-optimizer-overlaps", "--mapl-projector-exchange bf16", 1, 4),
        ("tp2-pp2", "", 1, 4),
        ("tp2-sp-pp2", "", 1, 4),
        ("full-recompute", "", 1, 2),
        ("muon", "--mapl-anchor full", 1, 2),
        ("per-token-loss", "--mapl-anchor none", 1, 4),
        ("bf16", "--mapl-forward-codec int8 --mapl-backward-codec int4 --mapl-anchor bigram", 1, 2),
    ],
)
def test_layouts(cluster: Cluster, name: str, more: str, boundaries: int, copies_each: int) -> None:
    """The traffic is what it was, since V crosses in the gradient's place."""
    layout = LAYOUTS[name]
    steps = boundaries + 3
    command = layout.command(MAPL, more, f"--eval-interval 1 --train-iters {steps}")
    without = cluster.run(layout.world_size, command)
    start = [*command, START, "2"]
    result = cluster.run(layout.world_size, start, tamper="note_what_is_sent")
    # In 16 bits the anchors that are noted are rounded; V is so by its exchange.
    rel = 1e-3 if "bf16" in (name, *more.split()) else 1e-6
    # Both ranks of tp2-pp2 hold all of them.
    tokens = layout.samples * SEQUENCE * (2 if name == "tp2-pp2" else 1)
    assert_the_best_of_each_step(result, 2, boundaries, tokens, rel)
    assert_sides_equal(result, boundaries, copies_each)
    assert result.losses[:2] == without.losses[:2] and result.losses[2:] != without.losses[2:]
    assert result.losses[-1] < result.losses[0] - 0.02
    assert result.traffic["boundaries"] == without.traffic["boundaries"]
    gradients = [[e["gradient_norm"] for e in line["boundaries"]] for line in result.metrics]
    assert [[norm == 0 for norm in norms] for norms in gradients] == [
        [step == 2 + boundary for boundary in range(boundaries)] for step in range(1, steps + 1)
    ]
    assert all(e["skipped_steps"] == 0 for line in result.metrics for e in line["boundaries"])


@pytest.mark.parametrize("projector", ["learned", "unconstrained", "fixed"])
def test_equals_the_pipeline(cluster: Cluster, tmp_path: Path, projector: str) -> None:
    """From one checkpoint, since Megatron draws the weights of each stage by its rank."""
    slow = "--lr 1e-4"  # so that the next step sends much what the spectrum was taken from
    more = f"{MAPL} --mapl-projector {projector} {SAVE} {slow} --load {tmp_path} {MEASURED}"
    more += " --train-iters 6"
    layout = LAYOUTS["pp4"]
    cluster.run(4, layout.command(more, f"--save {tmp_path} --exit-interval 2"))
    without = cluster.run(4, layout.command(more))
    pipeline = cluster.run(4, layout.command(more, START, "3"))
    virtual = cluster.run(1, Layout(1, "--mapl-virtual-stages 4").command(more, START, "3"))
    assert len(virtual.losses) == 4 and virtual.losses[0] == pytest.approx(without.losses[0])
    assert virtual.losses == pytest.approx(pipeline.losses, rel=1e-6)
    assert virtual.validation == pytest.approx(pipeline.validation, rel=1e-6)
    assert virtual.traffic["total"] == pipeline.traffic["total"]
    assert_same_projectors(virtual, pipeline)
    ours, others = energy(pipeline), energy(without)
    assert ours[0] == others[0]
    for boundary in range(3):  # in the step after the one in which it started
        assert ours[boundary + 1][boundary] > others[boundary + 1][boundary] + 0.01
    for result in (pipeline, virtual):
        for states in copies(result).values():
            assert len(states) == 2 and torch.equal(states[0]["A"], states[1]["A"])
    sent, usual = pipeline.traffic["total"]["projector"], without.traffic["total"]["projector"]
    if projector == "fixed":
        assert usual == 0 and sent == 3 * 2 * HIDDEN * RANK * 4  # once, by both sides of each
    else:
        assert sent == usual


@pytest.mark.parametrize("name", ["pp2-dp2", "tp2-pp2", "tp2-sp-pp2"])
def test_replicas_and_tensor_parallel_ranks_give_what_one_process_gives(
    cluster: Cluster, name: str
) -> None:
    more = f"{MAPL} --mapl-projector fixed"
    expected = cluster.run_once(2, LAYOUTS["pp2"].command(more, START, "1"))
    result = cluster.run(4, LAYOUTS[name].command(more, START, "1"))
    assert_same_projectors(result, expected)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert all(torch.equal(state["A"], copies(result)[0][0]["A"]) for state in copies(result)[0])


def test_fixed_stays_where_it_started(cluster: Cluster) -> None:
    command = LAYOUTS["pp2"].command(f"{MAPL} --mapl-projector fixed", START)
    short = cluster.run(2, [*command, "2", "--train-iters", "2"])
    longer = cluster.run(2, [*command, "2"])
    ((one, *_),), ((other, *_),) = copies(short).values(), copies(longer).values()
    assert torch.equal(one["A"], other["A"])


@pytest.mark.parametrize(
    ("name", "more", "step"),
    [
        ("pp2-dp2-distributed-optimizer", "", 1),
        ("pp2-dp2-distributed-optimizer", "", 3),
        ("pp2-vpp2-overlapped", "--mapl-projector fixed", 1),
        ("pp2-vpp2-overlapped", "--mapl-projector fixed", 2),
        ("pp2-vpp2-overlapped", "--mapl-projector fixed", 3),
        ("pp4", "", 1),
        ("pp4", "", 2),
        ("pp4", "", 3),
    ],
)
def test_resume_continues_bitwise(
    cluster: Cluster, tmp_path: Path, name: str, more: str, step: int
) -> None:
    """Each once, whether the checkpoint, after step 2, comes before, between or after their steps.

    With three boundaries they are 1 to 3, 2 to 4 or 3 to 5.
    """
    layout = LAYOUTS[name]

    def run(*flags: str) -> Result:
        return cluster.run(
            layout.world_size,
            layout.command(MAPL, more, SAVE, "--train-iters 6", START, str(step), *flags),
        )

    straight = run(f"--save {tmp_path}/straight")
    first = run(f"--save {tmp_path}/cut --exit-interval 2")
    resumed = run(f"--save {tmp_path}/cut --load {tmp_path}/cut")
    assert [*first.losses, *resumed.losses] == straight.losses
    for boundary, states in copies(straight).items():
        for state, other in zip(states, copies(resumed)[boundary], strict=True):
            assert all(torch.equal(tensor, other[key]) for key, tensor in state.items())


def test_fp16_starts_in_a_step_that_megatron_skips(cluster: Cluster) -> None:
    """The loss scale overflows in all steps: nothing moves but by the start."""
    command = LAYOUTS["fp16"].command(f"{MAPL} --train-iters 2 --lr-decay-iters 10")
    without, result = cluster.run(2, command), cluster.run(2, [*command, START, "2"])
    ((old, _),), ((one, other),) = copies(without).values(), copies(result).values()
    assert torch.equal(one["A"], other["A"]) and not one["momentum"].any()
    assert torch.equal(old["A"], copies(without, "start")[0][0]["A"])
    assert (one["A"] - old["A"]).abs().max() > 0.01
    assert (one["A"].T @ one["A"] - torch.eye(RANK)).abs().max() < 1e-5


def test_activations_that_are_not_finite_end_the_job(cluster: Cluster) -> None:
    more = (
        f"{MAPL} --no-check-for-nan-in-loss-and-grad --lr 1e37 --mapl-projector-lr-mult 1e-38 "
        "--optimizer sgd --clip-grad 0"
    )
    result = cluster.run(2, LAYOUTS["pp2"].command(more, START, "3"), fails=True)
    assert "boundary 0: activations of step 3 are not finite" in result.log
