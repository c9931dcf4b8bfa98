# SPDX-License-Identifier: Apache-2.0
"""`--mapl-projector subspace`: boundaries lose nothing, because the weights are held in span U."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import Cluster, Result
from layouts import LAYOUTS, PP2, Layout
from mapl.traffic import KINDS
from test_checkpoint import SAVE, error_line

RANK = 16
FIXED = f"--mapl-rank {RANK} --mapl-anchor static --mapl-projector fixed"
SUBSPACE = f"--mapl-rank {RANK} --mapl-anchor static --mapl-projector subspace"
DISTRIBUTED = "--use-distributed-optimizer"

#: Layout → its last constrained layer, from 1: the last stage's two layers are free, or its one.
JOBS = {
    "pp4": (LAYOUTS["pp4"], 3),
    "virtual": (Layout(1, "--mapl-virtual-stages 2 --num-layers 6"), 4),
    "pp2-vpp2-overlapped": (LAYOUTS["pp2-vpp2-overlapped"], 3),
    "tp2-pp2": (LAYOUTS["tp2-pp2"], 2),
    "tp2-sp-pp2": (LAYOUTS["tp2-sp-pp2"], 2),
    "pp2-dp2": (LAYOUTS["pp2-dp2"], 2),
    "muon": (LAYOUTS["muon"], 2),
    "muon-bf16": (Layout(2, f"{PP2} --optimizer muon --bf16"), 2),
    "muon-distributed": (Layout(2, f"{PP2} --optimizer muon --bf16 {DISTRIBUTED}"), 2),
    "distributed": (Layout(2, f"{PP2} {DISTRIBUTED} --overlap-grad-reduce"), 2),
    "distributed-bf16": (
        Layout(2, f"{PP2} --bf16 {DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"),
        2,
    ),
    "bf16": (Layout(2, f"{PP2} --bf16"), 2),
    "fp16": (Layout(2, f"{PP2} --fp16 --initial-loss-scale 1024"), 2),
}


def crossings(result: Result) -> dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Boundary → (X, F[t], X̂) of each micro-batch and of each process that holds other tokens."""
    found: dict[int, list[Any]] = {}
    senders = [r for r in result.records if r["sent"]]
    receivers = [r for r in result.records if r["received"]]
    for boundary in sorted({b for record in senders for b in record["sent"]}):
        sent = [r["sent"][boundary] for r in senders if boundary in r["sent"]]
        received = [r["received"][boundary] for r in receivers if boundary in r["received"]]
        for ours, theirs in zip(sent, received, strict=True):
            pairs = zip(ours, theirs, strict=True)
            found.setdefault(boundary, []).extend((x, f, decoded) for (x, f), decoded in pairs)
    return found


def lost(result: Result) -> list[tuple[float, float]]:
    """Of each crossing, as parts of ‖X‖: what of X − F[t] is outside of span U, and X̂ − X."""
    u = result.records[0]["projectors"][0, "outlet"]["A"].double()
    ratios = []
    for triples in crossings(result).values():
        for x, anchor, decoded in triples:
            anchored = x - anchor
            outside = anchored - anchored @ u @ u.T
            ratios.append(
                (float(outside.norm() / x.norm()), float((decoded - x).norm() / x.norm()))
            )
    return ratios


@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_lost(cluster: Cluster, name: str) -> None:
    layout, constrained = JOBS[name]
    result = cluster.run(layout.world_size, layout.command(SUBSPACE), tamper="note_subspace")
    assert result.losses[-1] < result.losses[0] - 0.02
    half = "--bf16" in layout.arguments or "--fp16" in layout.arguments
    ratios = lost(result)
    assert len(ratios) >= 4 * layout.micro_batches
    for outside, difference in ratios:
        # X itself is rounded, at the size of F, which is 1.
        assert outside < (1e-2 if half else 1e-6)
        assert difference < (1e-2 if half else 1e-6)
    layers = set()
    for record in result.records:
        assert len(record["outside"]) == 4  # steps
        for step in record["outside"]:
            for weight, (model, main) in step.items():
                held = weight == "embedding" or weight[1] <= constrained
                layers.add(weight)
                if held:
                    assert main < 1e-6, weight
                    assert model < (4e-3 if half else 1e-6), weight
                else:
                    assert main > 0.5 and model > 0.5, weight
    count = 6 if name == "virtual" else 4
    assert len(layers) == 1 + 2 * count


def test_without_the_constraint_something_is(cluster: Cluster) -> None:
    """The same boundaries in a model that is free."""
    result = cluster.run(4, LAYOUTS["pp4"].command(FIXED), tamper="note_subspace")
    for outside, difference in lost(result):
        assert outside > 0.1 and difference > 0.03
    for record in result.records:
        for step in record["outside"]:
            assert all(main > 0.5 for _, main in step.values())


def test_boundaries_change_nothing_in_either_direction(cluster: Cluster) -> None:
    """Three of them or one, with the same free layers: gradients too are what they would be.

    With SGD, unclipped, whose step is linear: what the way back takes from a gradient, the
    projection would take from the step.
    """
    linear = "--optimizer sgd --sgd-momentum 0.9 --lr 0.3 --clip-grad 0 --num-layers 8"
    losses = {}
    for name, settings in (("subspace", SUBSPACE), ("fixed", FIXED)):
        for stages in (2, 4):
            layout = Layout(1, f"--mapl-virtual-stages {stages} {linear}")
            losses[name, stages] = cluster.run(1, layout.command(settings)).losses
    assert losses["subspace", 4] == pytest.approx(losses["subspace", 2], rel=1e-6)
    assert losses["fixed", 4][-1] != pytest.approx(losses["fixed", 2][-1], rel=1e-4)
    assert losses["subspace", 4][-1] < losses["subspace", 4][0] - 0.02


def test_one_subspace_and_one_table(cluster: Cluster) -> None:
    """On all stages, none of it trained; retained and not sent."""
    result = cluster.run_once(4, LAYOUTS["pp4"].command(SUBSPACE))
    held = [state["A"] for record in result.records for state in record["projectors"].values()]
    assert len(held) == 6 and all(torch.equal(a, held[0]) for a in held)
    for record in result.records:
        for place, state in record["start"].items():
            assert torch.equal(state["A"], record["projectors"][place]["A"])
        (anchor,) = record["anchors"]
        assert torch.equal(anchor["table"], result.records[0]["anchors"][0]["table"])
        assert anchor["table"].std().item() == pytest.approx(1, rel=0.05)
    total = result.traffic["total"]
    assert {kind for kind in KINDS if total[kind]} == {"header", "ids", "latents"}
    kept = [line["energy_kept"] for step in result.metrics[1:] for line in step["boundaries"]]
    assert kept and all(energy == pytest.approx(1, abs=1e-5) for energy in kept)


@pytest.mark.parametrize("name", ["pp4", "muon", "muon-bf16", "bf16", "distributed-bf16"])
def test_resume_continues_bitwise(cluster: Cluster, tmp_path: Path, name: str) -> None:
    layout, _ = JOBS[name]
    settings = f"{SUBSPACE} {SAVE}"
    straight = cluster.run(
        layout.world_size, layout.command(settings, f"--save {tmp_path}/straight")
    )
    cut = f"--save {tmp_path}/cut"
    first = cluster.run(layout.world_size, layout.command(settings, cut, "--exit-interval 2"))
    resumed = cluster.run(
        layout.world_size, layout.command(settings, cut, f"--load {tmp_path}/cut")
    )
    assert first.losses == straight.losses[:2]
    assert resumed.losses == straight.losses[2:]
    assert resumed.validation == straight.validation
    assert "outside of the subspace" not in resumed.log


@pytest.fixture(scope="module")
def checkpoints(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of two stages, whose last two layers are free: plain, and in the subspace."""
    folders = {}
    for name, settings in (("plain", ""), ("subspace", SUBSPACE)):
        folders[name] = tmp_path_factory.mktemp(name)
        save = f"--save {folders[name]} --exit-interval 2 --dist-ckpt-optim-fully-reshardable"
        cluster.run(2, LAYOUTS["pp2"].command(settings, SAVE, save))
    return folders


def test_a_plain_checkpoint_is_projected(cluster: Cluster, checkpoints: dict[str, Path]) -> None:
    load = f"--load {checkpoints['plain']} --mapl-checkpoint fresh --bf16"
    result = cluster.run(2, LAYOUTS["pp2"].command(SUBSPACE, SAVE, load), tamper="note_subspace")
    assert "5 weights of the checkpoint were outside of the subspace" in result.log
    assert all(difference < 1e-2 for _, difference in lost(result))
    assert all(main < 1e-6 for _, main in result.records[0]["outside"][0].values())


def test_more_stages_constrain_what_was_free(
    cluster: Cluster, checkpoints: dict[str, Path]
) -> None:
    """The last stage of four has one layer; the third layer was free until now."""
    more = f"--load {checkpoints['subspace']} --dist-ckpt-optim-fully-reshardable"
    result = cluster.run(4, LAYOUTS["pp4"].command(SUBSPACE, SAVE, more), tamper="note_subspace")
    assert "2 weights of the checkpoint were outside of the subspace" in result.log
    assert all(difference < 1e-5 for _, difference in lost(result))


def test_new_boundaries_from_another_seed_are_refused(
    cluster: Cluster, checkpoints: dict[str, Path]
) -> None:
    more = f"--load {checkpoints['subspace']} --dist-ckpt-optim-fully-reshardable --seed 5"
    result = cluster.run(4, LAYOUTS["pp4"].command(SUBSPACE, SAVE, more), fails=True)
    line = error_line(result)
    assert "boundaries 0 and 1 hold different subspaces" in line and "--seed 5; use" in line


def test_evaluation_alone(cluster: Cluster, checkpoints: dict[str, Path]) -> None:
    """There is no optimizer then, and no fp32 copy of a weight."""
    more = f"--load {checkpoints['subspace']} --skip-train --no-load-optim --bf16"
    result = cluster.run(2, LAYOUTS["pp2"].command(SUBSPACE, SAVE, more), tamper="note_subspace")
    assert result.validation and "outside of the subspace" not in result.log
    assert all(difference < 1e-2 for _, difference in lost(result))
