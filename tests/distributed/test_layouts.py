# SPDX-License-Identifier: Apache-2.0
"""Training at r < d in every layout: both sides of every boundary stay bitwise equal and learn."""

from typing import Any

import pytest
import torch

from cluster import Cluster, Result
from layouts import HIDDEN, LAYOUTS, SEQUENCE
from mapl.codecs import CodecSettings
from mapl.traffic import KINDS
from traffic_budget import Job, budget

RANK = 16


def copies(result: Result, when: str = "projectors") -> dict[int, list[Any]]:
    """Boundary → its projector in every process that holds it."""
    held: dict[int, list[Any]] = {}
    for record in result.records:
        for (boundary, _), state in record[when].items():
            held.setdefault(boundary, []).append(state)
    return held


def assert_sides_equal(result: Result, boundaries: int, copies_each: int) -> None:
    """Every copy of every projector is the same, bit for bit, orthonormal, and has moved."""
    held, started = copies(result), copies(result, "start")
    assert sorted(held) == list(range(boundaries))
    for boundary, states in held.items():
        assert len(states) == copies_each
        for state in states:
            assert state["A"].dtype == torch.float32
            for name in ("A", "momentum"):
                assert torch.equal(state[name], states[0][name]), (boundary, name)
        identity = torch.eye(states[0]["A"].shape[1])
        assert (states[0]["A"].T @ states[0]["A"] - identity).abs().max() < 1e-5
        assert all(torch.equal(s["A"], started[boundary][0]["A"]) for s in started[boundary])
        assert (states[0]["A"] - started[boundary][0]["A"]).abs().max() > 1e-5, boundary


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_sides_are_bitwise_equal(cluster: Cluster, name: str) -> None:
    layout = LAYOUTS[name]
    result = cluster.run_once(layout.world_size, layout.command(f"--mapl-rank {RANK}"))
    replicas = layout.processes_a_stage
    assert_sides_equal(result, layout.boundaries, 2 * replicas)
    assert result.losses[-1] < result.losses[0] - 0.02
    for anchors in [record["anchors"] for record in result.records]:
        for anchor in anchors:  # every table was trained
            assert anchor["E"].abs().max() > 0
    total = result.traffic["total"]
    sent = sum(total[kind] for kind in KINDS)
    assert sent == total["sent"]
    # Without sequence parallelism plain Megatron sends every activation twice, boundaries once.
    split = 2 if name == "tp2-pp2" else 1
    latent_ratio = total["uncompressed"] / total["latents"]
    assert latent_ratio == pytest.approx(split * HIDDEN / RANK)
    # What replicas and tensor-parallel ranks hold alike is sent once.
    once = (replicas - 1) * total["projector"] + (split - 1) * (total["latents"] + total["ids"])
    assert total["unsplit"] - sent == pytest.approx(once, rel=0.02, abs=0)


@pytest.mark.parametrize(
    "name",
    [
        "pp4",
        "pp2-vpp2-overlapped",
        "tp2-pp2",
        "tp2-sp-pp2",
        "pp2-dp2-distributed-optimizer-overlaps",
        "bf16",
        "fp16",
        "muon",
        "moe-ep2",
        "full-recompute",
    ],
)
def test_the_defaults(cluster: Cluster, name: str) -> None:
    """Bigram anchors, int8 forward, int4 backward, as a user gets them with --mapl-rank alone."""
    layout = LAYOUTS[name]
    more = "--initial-loss-scale 1024" if name == "fp16" else ""
    result = cluster.run(layout.world_size, layout.bare_command(f"--mapl-rank {RANK}", more))
    for states in copies(result).values():
        assert all(torch.equal(state["A"], states[0]["A"]) for state in states)
    assert result.losses[-1] < result.losses[0] - 0.02
    for record in result.records:
        for anchor in record["anchors"]:
            assert anchor["E"].abs().max() > 0 and anchor["B"].abs().max() > 0
    tokens = [
        boundary[direction]["latents"]
        for boundary in result.traffic["boundaries"]
        for direction in ("forward", "backward")
    ]
    forward, backward = tokens[::2], tokens[1::2]
    # Evaluations have no backward pass; a byte and half a byte a number.
    assert all(f > 2 * b > 0 for f, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("anchor", ["factorized", "bigram", "full"])
def test_parameters_that_are_gathered_late_are_waited_for(cluster: Cluster, anchor: str) -> None:
    """With overlapped gathers a module's parameters are old until Megatron's hook on it has run."""
    layout = LAYOUTS["pp2-dp2-distributed-optimizer"]
    more = f"--mapl-rank {RANK} --mapl-anchor {anchor} --lr 0.01 --overlap-grad-reduce"
    at_once = cluster.run_once(4, layout.command(more))
    late = cluster.run(4, layout.command(more, "--overlap-param-gather"))
    assert late.losses == at_once.losses
    assert at_once.losses[-1] < at_once.losses[0] - 0.05


def test_replicas_hold_the_same_anchors(cluster: Cluster) -> None:
    layout = LAYOUTS["pp2-dp2-distributed-optimizer"]
    result = cluster.run_once(layout.world_size, layout.command(f"--mapl-rank {RANK}"))
    for stage in range(2):  # ranks 0, 1 are stage 0 and ranks 2, 3 stage 1
        one, other = (result.records[2 * stage + replica]["anchors"] for replica in range(2))
        assert torch.equal(one[0]["E"], other[0]["E"])


def test_a_skipped_step_leaves_the_projector_untouched(cluster: Cluster) -> None:
    """fp16 with a loss scale that overflows in all of the first steps."""
    layout = LAYOUTS["fp16"]
    result = cluster.run(
        2, layout.command(f"--mapl-rank {RANK} --train-iters 2 --lr-decay-iters 10")
    )
    for boundary, states in copies(result).items():
        for state, start in zip(states, copies(result, "start")[boundary], strict=True):
            assert torch.equal(state["A"], start["A"])
            assert torch.equal(state["momentum"], start["momentum"])


@pytest.mark.parametrize("anchor", ["none", "static", "full", "bigram", "factorized"])
@pytest.mark.parametrize("projector", ["fixed", "unconstrained"])
def test_anchors_and_projectors(cluster: Cluster, anchor: str, projector: str) -> None:
    layout = LAYOUTS["pp2"]
    settings = f"--mapl-rank {RANK} --mapl-anchor {anchor} --mapl-projector {projector}"
    result = cluster.run(2, layout.command(settings))
    held, started = copies(result), copies(result, "start")
    for boundary, states in held.items():
        assert torch.equal(states[0]["A"], states[1]["A"])
        moved = not torch.equal(states[0]["A"], started[boundary][0]["A"])
        assert moved == (projector != "fixed")
    assert ("projector" in result.traffic["boundaries"][0]) == (projector != "fixed")
    assert bool(result.traffic["total"]["ids"]) == (anchor != "none")
    assert result.losses[-1] < result.losses[0] - 0.05


def test_each_boundary_its_own_rank(cluster: Cluster) -> None:
    """Boundary 0 is left uncompressed and passes on the token ids that stage 1 needs."""
    layout = LAYOUTS["pp4"]
    more = f"--mapl-rank 0 {RANK} 32 --mapl-geometry-interval 4"
    result = cluster.run(4, layout.command(more))
    held = copies(result)
    assert {boundary: state[0]["A"].shape[1] for boundary, state in held.items()} == {1: 16, 2: 32}
    first, second, third = result.traffic["boundaries"]
    # Four steps of training, and two evaluations, on the way forward.
    tokens = (4 + 2) * layout.samples * SEQUENCE
    assert first["forward"]["latents"] == tokens * HIDDEN * 4
    assert first["forward"]["ids"] == tokens  # 256 tokens: ids of one byte
    assert second["forward"]["latents"] == tokens * RANK * 4
    assert third["forward"]["latents"] == tokens * 32 * 4
    geometry = result.metrics[-1]["geometry"]  # rank 0, which gathers, has no projector itself
    assert [(e["boundary"], e["rank"]) for e in geometry["boundaries"]] == [(1, RANK), (2, 32)]
    assert [entry["boundaries"] for entry in geometry["angles"]] == [[1, 2]]


def test_uncompressed_tail_needs_no_ids(cluster: Cluster) -> None:
    layout = LAYOUTS["pp4"]
    result = cluster.run(4, layout.command(f"--mapl-rank {RANK} 0 0"))
    ids = [boundary["forward"]["ids"] for boundary in result.traffic["boundaries"]]
    assert ids[0] > 0 and ids[1:] == [0, 0]


def test_only_projector_and_anchors_differ_from_plain(cluster: Cluster) -> None:
    """A fixed square projector without anchors changes nothing, whatever its rank list says."""
    layout = LAYOUTS["pp4"]
    plain = cluster.run_once(4, layout.command(), plain=True)
    mapl = cluster.run(
        4,
        layout.command(
            f"--mapl-rank {HIDDEN} 0 {HIDDEN} --mapl-anchor none --mapl-projector fixed"
        ),
    )
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-6)


def test_evaluation_with_another_micro_batch_size(cluster: Cluster) -> None:
    layout = LAYOUTS["pp2"]  # in training four of 2, here three of 4
    more = "--eval-micro-batch-size 4 --eval-global-batch-size 12 --eval-interval 2"
    plain = cluster.run(2, layout.command(more), plain=True)
    mapl = cluster.run(2, layout.command(more, f"--mapl-rank {HIDDEN} --mapl-anchor none"))
    assert mapl.validation == pytest.approx(plain.validation, rel=1e-6)
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-6)


@pytest.mark.parametrize("name", ["pp2-vpp2-overlapped", "pp2-dp2"])
def test_measuring_changes_nothing_else(cluster: Cluster, name: str) -> None:
    """In each step, the first included, between steps that evaluate."""
    layout = LAYOUTS[name]
    more = f"--mapl-rank {RANK} --eval-interval 1"
    expected = cluster.run(layout.world_size, layout.command(more))
    result = cluster.run(layout.world_size, layout.command(more, "--mapl-geometry-interval 1"))
    assert (result.losses, result.validation) == (expected.losses, expected.validation)
    assert result.traffic["boundaries"] == expected.traffic["boundaries"]
    assert not any("geometry" in line for line in expected.metrics)
    boundaries = [*range(3 if "vpp" in name else 1)]
    for line in result.metrics:
        measured = line["geometry"]["boundaries"]
        assert [entry["boundary"] for entry in measured] == boundaries
    # The replicas' micro-batches differ, and the last line has their mean.
    replicas = [r["geometry"][0] for r in result.records if 0 in r["geometry"]]
    assert len({replica.energy_kept for replica in replicas}) == (2 if "dp2" in name else 1)
    mean = sum(replica.energy_kept for replica in replicas) / len(replicas)
    assert result.metrics[-1]["geometry"]["boundaries"][0]["energy_kept"] == pytest.approx(mean)


@pytest.mark.parametrize("codec", ["pipeline", "int4", "rvq", "topk", "lowrank"])
def test_traffic_budget_is_what_a_job_sends(cluster: Cluster, codec: str) -> None:
    forward = "pipeline" if codec == "lowrank" else codec
    flags = f"--mapl-rank {RANK} --mapl-forward-codec {forward} --mapl-backward-codec {codec}"
    own = {"topk": "--mapl-topk 3", "lowrank": "--mapl-lowrank-q 3"}.get(codec, "")
    layout = LAYOUTS["tp2-pp2"]
    result = cluster.run(4, layout.command(flags, own))
    planned = budget(
        Job(
            hidden_size=HIDDEN,
            rank=RANK,
            vocab_size=256,
            micro_batch_tokens=2 * SEQUENCE,
            step_tokens=layout.samples * SEQUENCE,
            dtype="fp32",
            tensor_model_parallel_size=2,
            forward_codec=forward,
            backward_codec=codec,
            projector_exchange="fp32",  # as in all jobs of layouts.py
            codecs=CodecSettings(topk=3, lowrank_q=3),
        )
    )
    sent = result.traffic["boundaries"][0]
    for direction in ("forward", "backward", "projector"):
        for kind in (*KINDS, "unsplit"):
            each = [
                entry[direction][kind] / entry[direction]["payloads"]
                for entry in (sent, planned["boundaries"][0])
            ]
            assert each[0] == each[1], (direction, kind)


@pytest.mark.parametrize(
    ("name", "more", "tolerance"),
    [
        ("pp2-dp2", "", 1e-4),
        ("pp2-dp2-distributed-optimizer-overlaps", "", 1e-4),
        ("tp2-pp2", "", 1e-4),
        ("tp2-sp-pp2", "", 1e-4),
        ("per-token-loss", "", 1e-4),
        ("bf16", "", 3e-2),
        ("fp16", "--initial-loss-scale 1024 --train-iters 4", 1e-2),
    ],
)
def test_the_projectors_gradient_is_that_of_one_replica(
    cluster: Cluster, name: str, more: str, tolerance: float
) -> None:
    """The same global batch gives the same dA, however it is spread and scaled."""
    settings = f"--mapl-rank {RANK} --mapl-log-interval 1"
    one = cluster.run_once(2, LAYOUTS["pp2"].command(settings))
    spread = cluster.run(LAYOUTS[name].world_size, LAYOUTS[name].command(settings, more))
    first, other = (run.metrics[0]["boundaries"][0]["gradient_norm"] for run in (one, spread))
    assert other == pytest.approx(first, rel=tolerance)
    # The step takes the direction alone, so the projector after it shows that too.
    held = [copies(run)[0][0]["A"] - copies(run, "start")[0][0]["A"] for run in (one, spread)]
    cosine = torch.nn.functional.cosine_similarity(*(moved.flatten() for moved in held), dim=0)
    assert cosine > 1 - 10 * tolerance


def test_a_run_that_ends_early_leaves_its_report(cluster: Cluster) -> None:
    more = f"--mapl-rank {RANK} --exit-interval 2"
    result = cluster.run(2, LAYOUTS["pp2"].command(more))
    assert result.traffic["steps"] == 2


def test_attention_through_torch(cluster: Cluster) -> None:
    """As on a GPU without Transformer Engine; whole steps, with no mask from the data loader."""
    layout = LAYOUTS["pp2"]
    more = f"--mapl-rank {RANK} --group-query-attention --num-query-groups 2"
    own = cluster.run(2, layout.command(more))
    result = cluster.run(
        2,
        layout.command(more, "--no-create-attention-mask-in-dataloader"),
        tamper="torch_attention",
    )
    assert result.losses == pytest.approx(own.losses, rel=1e-5)
    one, other = (copies(run)[0][0]["A"] for run in (result, own))
    assert not torch.equal(one, other)  # it was another way
