# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: resume is bitwise, cuts survive a changed pipeline, what does not fit is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import Cluster, Result
from layouts import LAYOUTS, Layout
from test_layouts import RANK, assert_sides_equal, copies

SAVE = "--save-interval 2 --ckpt-format torch_dist --lr-decay-iters 10 --lr-warmup-iters 1"
MAPL = f"--mapl-rank {RANK}"
#: Stages without embedding and output layer have no parameter in one of the groups.
MUON_WITH_RATES = "--optimizer muon --bf16 --decoupled-lr 1e-3"


def codecs(forward: str, backward: str, *more: str) -> str:
    """Flags of a job whose latents are quantised; few codes, so that they are all in use."""
    codes = "--mapl-rvq-codes 16" if "rvq" in (forward, backward) else ""
    columns = "--mapl-lowrank-q 4" if backward == "lowrank" else ""
    names = f"--mapl-forward-codec {forward} --mapl-backward-codec {backward}"
    return " ".join((names, codes, columns, *more))


def error_line(result: Result) -> str:
    """The one line that a refused job prints."""
    assert 2 in result.codes, result.log[-3000:]
    lines = [line for line in result.log.splitlines() if "pretrain_gpt.py: error:" in line]
    assert len(lines) == 1
    assert "Traceback" not in result.log
    return lines[0]


def anchors(result: Result) -> list[list[dict[str, torch.Tensor]]]:
    return [record["anchors"] for record in result.records]


def after_load(result: Result, rank: int) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """The projectors of a process as they were loaded: checked at start, then after the load."""
    loaded: dict[tuple[int, str], dict[str, torch.Tensor]] = result.records[rank]["checked"][1]
    return loaded


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("pp2-dp2-distributed-optimizer", ""),
        ("pp2-dp2-distributed-optimizer", "--async-save"),
        ("pp2-vpp2-overlapped", ""),
        ("muon", ""),
        ("pp4", MUON_WITH_RATES),
        ("pp4", f"{MUON_WITH_RATES} --mapl-anchor full"),
        ("pp2", f"{MUON_WITH_RATES} --pipeline-model-parallel-layout E|ttttL"),
        ("bf16", ""),
        ("fp16", "--initial-loss-scale 1024 --train-iters 4"),
        ("tp2-sp-pp2", "--use-distributed-optimizer"),
        ("moe-ep2", ""),
        ("pp2-dp2", codecs("rvq", "int8")),
        ("pp2-vpp2-overlapped", codecs("rvq", "rvq", "--mapl-rvq-order random")),
        ("tp2-pp2", codecs("int4", "rvq")),
        ("bf16", codecs("fp8", "int4")),
        ("pp2-dp2", codecs("pipeline", "lowrank")),
        ("tp2-pp2", codecs("int8", "lowrank")),
        ("pp2-dp2-distributed-optimizer", f"{codecs('int8', 'int4')} --mapl-anchor bigram"),
        ("tp2-sp-pp2", f"{codecs('int8', 'int4')} --mapl-anchor bigram"),
    ],
)
def test_resume_continues_bitwise(cluster: Cluster, tmp_path: Path, name: str, more: str) -> None:
    layout = LAYOUTS[name]
    straight = cluster.run(
        layout.world_size, layout.command(MAPL, SAVE, f"--save {tmp_path}/straight", more)
    )
    first = cluster.run(
        layout.world_size,
        layout.command(MAPL, SAVE, f"--save {tmp_path}/cut --exit-interval 2", more),
    )
    assert straight.losses[:2] == first.losses
    resumed = cluster.run(
        layout.world_size,
        layout.command(MAPL, SAVE, f"--save {tmp_path}/cut --load {tmp_path}/cut", more),
    )
    assert resumed.losses == straight.losses[2:]
    assert "load_return" not in resumed.log, "Megatron had to load without strictness"
    for boundary, states in copies(straight).items():
        for state, other in zip(states, copies(resumed)[boundary], strict=True):
            assert torch.equal(state["A"], other["A"])
            assert torch.equal(state["momentum"], other["momentum"])
    for ours, theirs in zip(anchors(straight), anchors(resumed), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    for one, other in zip(straight.records, resumed.records, strict=True):
        assert one["payloads"] == other["payloads"]
        assert one["lowrank"].keys() == other["lowrank"].keys()
        assert all(torch.equal(q, other["lowrank"][place]) for place, q in one["lowrank"].items())
        for place, codebooks in one["codebooks"].items():
            for ours, theirs in zip(codebooks, other["codebooks"][place], strict=True):
                assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def pp4_checkpoint(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps of four stages; cuts after layers 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("pp4")
    more = f"--save {folder} --exit-interval 2 --dist-ckpt-optim-fully-reshardable"
    distributed = "--use-distributed-optimizer"
    result = cluster.run(4, LAYOUTS["pp4"].command(MAPL, SAVE, more, distributed))
    return folder, result


def test_fewer_stages_keep_the_cuts_that_still_exist(cluster: Cluster, pp4_checkpoint: Any) -> None:
    folder, before = pp4_checkpoint
    more = f"--load {folder} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    after = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, more))
    kept = copies(before)[1][0]  # after layer 2
    loaded = after_load(after, 0)
    assert torch.equal(loaded[0, "outlet"]["A"], kept["A"])
    assert torch.equal(loaded[0, "outlet"]["momentum"], kept["momentum"])
    assert "mapl.stage_0_2.E is new in this pipeline: it starts as mapl.stage_1_2.E" in after.log
    assert "mapl.stage_2_4.E is new in this pipeline: it starts as mapl.stage_2_3.E" in after.log
    assert_sides_equal(after, 1, 2)


@pytest.mark.parametrize("anchor", ["factorized", "bigram"])
def test_more_stages_say_which_cuts_are_fresh(
    cluster: Cluster, tmp_path: Path, anchor: str
) -> None:
    more = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    more += f" --mapl-anchor {anchor}"
    save = f"--save {tmp_path} --exit-interval 2"
    before = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, more, save))
    after = cluster.run(4, LAYOUTS["pp4"].command(MAPL, SAVE, more, f"--load {tmp_path}"))
    assert "cut_1 is new in this pipeline: its projector starts fresh" in after.log
    assert "cut_3 is new in this pipeline: its projector starts fresh" in after.log
    assert "cut_2 is new" not in after.log
    loaded = after_load(after, 1)
    assert torch.equal(loaded[1, "outlet"]["A"], copies(before)[0][0]["A"])
    fresh = after.records[0]["start"][0, "outlet"]["A"]
    assert torch.equal(after_load(after, 0)[0, "outlet"]["A"], fresh)
    tables = "EB" if anchor == "bigram" else "E"
    for table in tables:
        assert (
            f"stage_3_4.{table} is new in this pipeline: it starts as mapl.stage_2_4" in after.log
        )
    assert_sides_equal(after, 3, 2)


@pytest.fixture(scope="module")
def checkpoints(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of two stages, plain and with boundaries."""
    folders = {}
    for name, settings in (("plain", ""), ("mapl", MAPL)):
        folders[name] = tmp_path_factory.mktemp(name)
        save = f"--save {folders[name]} --exit-interval 2"
        cluster.run(2, LAYOUTS["pp2"].command(settings, SAVE, save))
    return folders


@pytest.mark.parametrize(
    ("saved", "settings", "message"),
    [
        (
            "plain",
            MAPL,
            "without MAPL boundaries; use the checkpoint's settings, or --mapl-checkpoint fresh",
        ),
        ("mapl", "", "add --mapl-rank, or --mapl-checkpoint drop"),
        ("mapl", "--mapl-rank 8", "shape [64, 16], this run's flags ask for [64, 8]"),
        ("mapl", f"{MAPL} --mapl-anchor-rank 8", "shape [256, 16], this run's flags ask"),
        ("mapl", f"{MAPL} --mapl-anchor none", "--mapl-anchor none differs from the checkpoint's"),
        ("mapl", f"{MAPL} --mapl-projector fixed", "--mapl-projector fixed differs"),
    ],
)
def test_what_does_not_fit_is_refused(
    cluster: Cluster, checkpoints: dict[str, Path], saved: str, settings: str, message: str
) -> None:
    command = LAYOUTS["pp2"].command(settings, SAVE, f"--load {checkpoints[saved]}")
    result = cluster.run(2, command, fails=True)
    line = error_line(result)
    assert message in line and str(checkpoints[saved]) in line


@pytest.mark.parametrize(
    ("saved", "settings", "message"),
    [
        (
            "plain",
            f"{MAPL} --mapl-checkpoint fresh",
            "start anew, because it holds a model without",
        ),
        ("mapl", "--mapl-rank 8 --mapl-checkpoint fresh", "start anew, because"),
        ("mapl", "--mapl-checkpoint drop", "after layers 2 are left out"),
    ],
)
def test_conversion_when_asked_for(
    cluster: Cluster, checkpoints: dict[str, Path], saved: str, settings: str, message: str
) -> None:
    load = f"--load {checkpoints[saved]} --lr-decay-style linear"
    result = cluster.run(2, LAYOUTS["pp2"].command(settings, SAVE, load))
    assert message in result.log
    assert len(result.losses) == 2  # steps 3 and 4
    rate = re.search(r"iteration +3/.*?learning rate: (\S+)", result.log)
    assert rate is not None  # after 3 of 10 steps, the first of them warm-up: it goes on, not anew
    assert float(rate[1]) == pytest.approx(3e-3 * (1 - 2 / 9), rel=1e-5)
    if "--mapl-rank" in settings:
        assert_sides_equal(result, 1, 2)


def test_fresh_changes_nothing_where_the_checkpoint_fits(
    cluster: Cluster, checkpoints: dict[str, Path]
) -> None:
    """So a job that began with it may be restarted as it is."""
    load = f"--load {checkpoints['mapl']}"
    plain = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, load))
    fresh = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, load, "--mapl-checkpoint fresh"))
    assert "start anew" not in fresh.log
    assert fresh.losses == plain.losses


def test_another_padding_of_the_vocabulary(cluster: Cluster, tmp_path: Path) -> None:
    """150 tokens are padded to 192 rows for one tensor parallel rank, to 256 for two."""
    more = "--vocab-size 150 --make-vocab-size-divisible-by 64"
    more += " --global-batch-size 16"  # two steps must gain more than the rows that are new cost
    saved = cluster.run(
        2, LAYOUTS["pp2"].command(MAPL, SAVE, more, f"--save {tmp_path} --exit-interval 2")
    )
    load = f"--load {tmp_path} --no-load-optim --no-load-rng"
    result = cluster.run(4, LAYOUTS["tp2-pp2"].command(MAPL, SAVE, more, load))
    assert anchors(saved)[0][0]["E"].shape[0] == 192
    assert anchors(result)[0][0]["E"].shape[0] == 256
    assert result.losses[0] < saved.losses[0] - 0.05  # it went on, and did not start anew


def test_finetune_forgets_momentum(cluster: Cluster, checkpoints: dict[str, Path]) -> None:
    command = LAYOUTS["pp2"].command(MAPL, SAVE, f"--load {checkpoints['mapl']} --finetune")
    result = cluster.run(2, command)
    assert after_load(result, 0)[0, "outlet"]["momentum"].abs().max() == 0
    assert len(result.losses) == 4


def test_use_checkpoint_args(cluster: Cluster, checkpoints: dict[str, Path]) -> None:
    """The boundaries' settings come from the checkpoint, like the model's."""
    layout = Layout(2, f"{SAVE} --load {checkpoints['mapl']} --use-checkpoint-args")
    result = cluster.run(2, layout.command("--pipeline-model-parallel-size 2"))
    assert copies(result)[0][0]["A"].shape == (64, RANK)
    assert len(result.losses) == 2


def test_a_side_that_differs_is_found(cluster: Cluster, checkpoints: dict[str, Path]) -> None:
    command = LAYOUTS["pp2"].command(MAPL, SAVE, f"--load {checkpoints['mapl']}")
    result = cluster.run(2, command, tamper="nudge_projector_after_load", fails=True)
    assert "the projector of boundary 0 differs between ranks 0 and 1" in result.log


def test_fewer_stages_keep_their_codebooks(cluster: Cluster, tmp_path: Path) -> None:
    more = f"{codecs('rvq', 'rvq')} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    before = cluster.run(
        4, LAYOUTS["pp4"].command(MAPL, SAVE, more, f"--save {tmp_path} --exit-interval 2")
    )
    after = cluster.run(
        2, LAYOUTS["pp2"].command(MAPL, SAVE, more, f"--load {tmp_path} --exit-interval 2")
    )
    saved = before.records[1]["codebooks"][1, "outlet"]  # after layer 2
    loaded = [record["loaded_codebooks"] for record in after.records]
    for side in (loaded[0][0, "outlet"], loaded[1][0, "inlet"]):
        for one, other in zip(side, saved, strict=True):
            assert torch.equal(one, other)


def test_another_codec_starts_fresh(cluster: Cluster, tmp_path: Path) -> None:
    """A codec is no part of the model: the run goes on without a permission."""
    save = f"--save {tmp_path} --exit-interval 2"
    before = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, save, codecs("int8", "rvq")))
    command = LAYOUTS["pp2"].command(MAPL, SAVE, f"--load {tmp_path}", codecs("rvq", "rvq"))
    after = cluster.run(2, command)
    assert "mapl.cut_2.forward_codec: the checkpoint has no codebooks of this size" in after.log
    assert "mapl.cut_2.backward_codec: the checkpoint has no" not in after.log
    assert after.losses[-1] < before.losses[-1]


def test_lowrank_goes_on_or_starts_fresh(cluster: Cluster, tmp_path: Path) -> None:
    """Q is read where it fits; fewer stages find that of the cut which still exists."""
    more = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    lowrank = codecs("pipeline", "lowrank")
    save = f"{lowrank} --save {tmp_path} --exit-interval 2"
    before = cluster.run(4, LAYOUTS["pp4"].command(MAPL, SAVE, more, save))
    saved = before.records[2]["lowrank"][1]  # after layer 2, of the stage that sends gradients
    for settings, fresh in ((lowrank, False), (f"{lowrank} --mapl-lowrank-q 5", True)):
        load = f"{settings} --load {tmp_path}"
        after = cluster.run(2, LAYOUTS["pp2"].command(MAPL, SAVE, more, load))
        note = "mapl.cut_2.backward_codec: the checkpoint has no Q of this size; it starts fresh"
        assert (note in after.log) == fresh
        assert after.records[0]["lowrank"] == {}
        loaded = after.records[1]["loaded_lowrank"][0]
        assert loaded.shape == (RANK, 5) if fresh else torch.equal(loaded, saved)
        assert after.losses[-1] < 5.5


def test_quantising_a_model_that_was_trained_without(cluster: Cluster, tmp_path: Path) -> None:
    """Without projector and anchor the model is the same function, so nothing stands in the way."""
    save = f"--save {tmp_path} --exit-interval 2"
    direct = f"--mapl-rank 64 --mapl-projector none --mapl-anchor none {codecs('int8', 'int8')}"
    plain = cluster.run(2, LAYOUTS["pp2"].command(SAVE, save))
    whole = cluster.run(2, LAYOUTS["pp2"].command(SAVE))
    quantised = cluster.run(2, LAYOUTS["pp2"].command(SAVE, direct, f"--load {tmp_path}"))
    assert len(plain.losses) == 2
    assert quantised.losses == pytest.approx(whole.losses[2:], rel=1e-2)
    back = tmp_path / "back"
    cluster.run(2, LAYOUTS["pp2"].command(SAVE, direct, f"--save {back} --exit-interval 2"))
    again = cluster.run(2, LAYOUTS["pp2"].command(SAVE, f"--load {back}"))
    assert again.losses == pytest.approx(whole.losses[2:], rel=1e-2)
