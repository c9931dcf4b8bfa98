# SPDX-License-Identifier: Apache-2.0
"""Boundaries inside one process give what a pipeline of as many processes gives."""

import tomllib
from pathlib import Path

import pytest
import torch

from cluster import Cluster, Result
from layouts import LAYOUTS, PP4, Layout

SAVE = "--save-interval 2 --ckpt-format torch_dist --lr-decay-iters 10 --lr-warmup-iters 1"
VIRTUAL = Layout(1, "--mapl-virtual-stages 4")

SETTINGS = {
    "pipeline": "",
    "fp8": "--mapl-forward-codec fp8 --mapl-backward-codec fp8",
    "int8": "--mapl-forward-codec int8 --mapl-backward-codec int8",
    "int4": "--mapl-forward-codec int4 --mapl-backward-codec int4",
    "rvq": "--mapl-forward-codec rvq --mapl-backward-codec rvq --mapl-rvq-codes 16",
    "rvq full": "--mapl-forward-codec rvq --mapl-rvq-codes 16 --mapl-rvq-sync full",
    "topk": "--mapl-forward-codec topk --mapl-backward-codec topk --mapl-topk 5",
    "topk, projector none": "--mapl-projector none --mapl-anchor none --mapl-topk 9 "
    "--mapl-forward-codec topk --mapl-backward-codec topk",
    "lowrank": "--mapl-backward-codec lowrank --mapl-lowrank-q 4",
    "lowrank, projector none": "--mapl-projector none --mapl-anchor none "
    "--mapl-backward-codec lowrank --mapl-lowrank-q 16",
    # One code of int8 that flips weighs less in a mean of more samples.
    "projector none": "--mapl-projector none --mapl-anchor none --mapl-forward-codec int8 "
    "--global-batch-size 16",
    "fixed projector": "--mapl-projector fixed",
    "unconstrained projector": "--mapl-projector unconstrained",
    "no anchor": "--mapl-anchor none",
    "static anchor": "--mapl-anchor static",
    "full anchor": "--mapl-anchor full",
    "bigram anchor": "--mapl-anchor bigram --mapl-anchor-buckets 200",
    "subspace": "--mapl-projector subspace --mapl-anchor static",
}
BIGRAM = "--mapl-anchor bigram"
#: In place of what a list trains at; the last of two flags holds.
SMALL = (
    "--train-iters 4 --micro-batch-size 2 --global-batch-size 8 --log-interval 1 "
    "--eval-iters 1 --eval-interval 100"
)
MEASURED = "--mapl-geometry-interval 2"


def projectors(result: Result) -> dict[tuple[int, str], torch.Tensor]:
    """(boundary, side) → A, of all processes."""
    return {
        key: state["A"] for record in result.records for key, state in record["projectors"].items()
    }


@pytest.mark.parametrize("name", [*SETTINGS, "defaults"])
def test_equals_the_pipeline(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """From one checkpoint, since Megatron draws the weights of each stage by its rank."""
    rank = "--mapl-rank 64" if "projector none" in name else "--mapl-rank 16"
    measures = name in ("pipeline", "full anchor", "rvq")
    own = SETTINGS.get(name, "")
    more = f"{rank} {own} {SAVE} --load {tmp_path} {MEASURED if measures else ''}"

    def command(layout: Layout, *last: str) -> list[str]:
        return (layout.bare_command if name == "defaults" else layout.command)(more, *last)

    cluster.run(4, command(LAYOUTS["pp4"], f"--save {tmp_path} --exit-interval 2"))
    pipeline = cluster.run(4, command(LAYOUTS["pp4"]))
    virtual = cluster.run(1, command(VIRTUAL))
    assert len(virtual.losses) == 2 and virtual.losses[-1] < 5.5
    assert virtual.losses == pytest.approx(pipeline.losses, rel=1e-6)
    assert virtual.validation == pytest.approx(pipeline.validation, rel=1e-6)
    for kind in ("boundaries", "total"):
        assert virtual.traffic[kind] == pipeline.traffic[kind]
    ours, theirs = projectors(virtual), projectors(pipeline)
    assert ours.keys() == theirs.keys() and (len(ours) == 6 or "projector none" in name)
    for key, a in ours.items():
        torch.testing.assert_close(a, theirs[key], rtol=0, atol=1e-5)
        assert torch.equal(a, ours[key[0], "inlet"])  # both sides, bit for bit
    if measures:
        assert_same_geometry(virtual, pipeline, boundaries=3)
    else:
        assert not any("geometry" in line for line in virtual.metrics + pipeline.metrics)


def test_equals_the_pipeline_in_the_settings_of_the_sweeps(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The optimizers and the dtype of tools/sweeps/headline.toml, with the default boundaries."""
    sweep = (Path(__file__).parents[2] / "tools" / "sweeps" / "headline.toml").read_text()
    flags = tomllib.loads(sweep)["training"]["flags"]
    assert "--bf16" in flags and "--optimizer muon" in flags
    more = f"--mapl-rank 16 {flags} {SMALL} {SAVE} --load {tmp_path}"
    saving = f"--save {tmp_path} --exit-interval 2"
    cluster.run(4, LAYOUTS["pp4"].bare_command(more, saving))
    pipeline = cluster.run(4, LAYOUTS["pp4"].bare_command(more))
    virtual = cluster.run(1, VIRTUAL.bare_command(more))
    # The first loss is from before a step of Muon, which in bf16 turns last digits into others.
    assert virtual.losses[0] == pipeline.losses[0]
    assert virtual.losses == pytest.approx(pipeline.losses, rel=1e-4)
    assert virtual.validation == pytest.approx(pipeline.validation, rel=1e-4)
    for kind in ("boundaries", "total"):
        assert virtual.traffic[kind] == pipeline.traffic[kind]
    assert len(virtual.losses) == 2 and virtual.losses[1] < virtual.losses[0] - 0.1


def assert_same_geometry(virtual: Result, pipeline: Result, boundaries: int) -> None:
    """Of the one step that was measured, the last of two."""
    (_, ours), (_, theirs) = virtual.metrics, pipeline.metrics
    assert "geometry" not in virtual.metrics[0] and "geometry" not in pipeline.metrics[0]
    found, expected = ours["geometry"]["boundaries"], theirs["geometry"]["boundaries"]
    assert [entry["boundary"] for entry in found] == [*range(boundaries)]
    for one, other in zip(found, expected, strict=True):
        assert one["rank_99"] == pytest.approx(other.pop("rank_99"), abs=1)  # may be on the verge
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-4)
        assert 0 < one["energy_kept"] < one["energy_ceiling"] < 1
        assert one["energy_random"] == 0.25 and 0 < one["cosine_pearson"] < 1
    pairs = [[p, q] for p in range(boundaries) for q in range(p + 1, boundaries)]
    found, expected = ours["geometry"]["angles"], theirs["geometry"]["angles"]
    assert [entry["boundaries"] for entry in found] == pairs
    assert [entry["boundaries"] for entry in expected] == pairs
    for one, other in zip(found, expected, strict=True):
        for name in ("mean_degrees", "smallest_degrees"):
            assert 0 < one[name] == pytest.approx(other[name], abs=0.01)


@pytest.mark.parametrize("more", ["", "--sequence-parallel", "--sequence-parallel " + BIGRAM])
def test_tensor_parallel(cluster: Cluster, tmp_path: Path, more: str) -> None:
    """Its ranks send a part of the tokens each, or other tokens."""
    tensor = f"--tensor-model-parallel-size 2 {more}"
    options = f"--mapl-rank 16 --mapl-forward-codec int8 {SAVE} --load {tmp_path} {MEASURED}"
    layout = Layout(4, f"--pipeline-model-parallel-size 2 {tensor}")
    cluster.run(4, layout.command(options, f"--save {tmp_path} --exit-interval 2"))
    pipeline = cluster.run(4, layout.command(options))
    virtual = cluster.run(2, Layout(2, f"--mapl-virtual-stages 2 {tensor}").command(options))
    assert virtual.losses == pytest.approx(pipeline.losses, rel=1e-6)
    assert virtual.traffic["total"] == pipeline.traffic["total"]
    assert_same_geometry(virtual, pipeline, boundaries=1)
    # Each process measures its own tokens, which the line of metrics then has the mean of.
    (entry,) = pipeline.metrics[-1]["geometry"]["boundaries"]
    one, other = (r["geometry"][0] for r in pipeline.records if r["geometry"])
    assert one.tokens == other.tokens == (32 if more else 64)
    assert (one.energy_kept == other.energy_kept) == (not more)
    assert entry["energy_kept"] == pytest.approx((one.energy_kept + other.energy_kept) / 2)


def test_predecessors_are_found_at_other_ranks(cluster: Cluster) -> None:
    """Under sequence parallelism, which changes nothing else."""
    options = f"--mapl-rank 16 {BIGRAM} --mapl-virtual-stages 4 --tensor-model-parallel-size 2"
    whole = cluster.run(2, Layout(2, options).command(""))
    shared = cluster.run(2, Layout(2, f"{options} --sequence-parallel").command(""))
    assert shared.losses == pytest.approx(whole.losses, rel=1e-5)
    assert shared.losses[-1] < shared.losses[0] - 0.05


def test_a_pipeline_goes_on_where_virtual_stages_left_off(cluster: Cluster, tmp_path: Path) -> None:
    more = f"--mapl-rank 16 {SAVE}"
    straight = cluster.run(1, VIRTUAL.command(more))
    cluster.run(1, VIRTUAL.command(more, f"--save {tmp_path} --exit-interval 2"))
    resumed = cluster.run(4, LAYOUTS["pp4"].command(more, f"--load {tmp_path}"))
    assert resumed.losses == pytest.approx(straight.losses[2:], rel=1e-6)
    assert straight.losses[-1] < straight.losses[0] - 0.05


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (PP4, "--pipeline-model-parallel-size 4 cuts it already"),
        ("--pipeline-model-parallel-layout EttttL", "-layout cannot be used with"),
        ("--decoder-last-pipeline-num-layers 4", "-num-layers cannot be used with"),
        ("--account-for-loss-in-pipeline-split", "-split cannot be used with"),
        ("--num-layers 6", "--mapl-virtual-stages 4 does not divide --num-layers 6"),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "--recompute-granularity full",
        ),
        ("--mapl-receive-ahead 2", "--mapl-receive-ahead 2 has no effect with"),
        ("--mapl-virtual-stages 1", "--mapl-virtual-stages 1 has no boundary"),
    ],
)
def test_what_does_not_fit_is_refused(cluster: Cluster, more: str, message: str) -> None:
    processes = 4 if more == PP4 else 1
    command = VIRTUAL.command("--mapl-rank 16", more)
    result = cluster.run(processes, command, fails=True)
    assert message in result.log
