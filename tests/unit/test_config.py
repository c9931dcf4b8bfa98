# SPDX-License-Identifier: Apache-2.0
"""Settings: every bad one gives an error that names the flag, the value and the remedy."""

from typing import Any

import pytest

from mapl.config import EmulationConfig, MaplConfig
from mapl.plan import plan_boundaries

FROZEN: dict[str, Any] = {"forward_codec": ["rvq"], "rvq_sync": "frozen"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": []}, r"--mapl-rank"),
        ({"rank": [-1]}, r"--mapl-rank -1"),
        ({"rank": [0]}, r"--mapl-rank 0 compresses nothing"),
        ({"rank": [0, 0]}, r"--mapl-rank 0 0 compresses nothing"),
        ({"rank": [8], "anchor_rank": 0}, r"--mapl-anchor-rank 0 must be positive"),
        ({"rank": [8], "anchor": "none", "anchor_rank": 4}, r"no effect with --mapl-anchor none"),
        ({"rank": [8], "projector": "fixed", "projector_lr_mult": 1.0}, r"--mapl-projector fixed"),
        ({"rank": [8], "projector_lr_mult": 0.0}, r"--mapl-projector-lr-mult 0.0"),
        ({"rank": [8], "projector_lr_mult": float("nan")}, r"--mapl-projector-lr-mult nan"),
        ({"rank": [8], "log_interval": 0}, r"--mapl-log-interval 0"),
        ({"rank": [8], "geometry_interval": 0}, r"--mapl-geometry-interval 0 must be at least 1"),
        (
            {"rank": [8], "geometry_interval": 5, "projector": "none", "anchor": "none"},
            r"--mapl-geometry-interval 5 has no effect with --mapl-projector none, .*leave it out",
        ),
        ({"rank": [8], "projector_start_step": 0}, r"--mapl-projector-start-step 0 must be at l"),
        (
            {"rank": [8], "projector_start_step": 5, "projector": "none", "anchor": "none"},
            r"--mapl-projector-start-step 5 has no effect with --mapl-projector none, .*leave it o",
        ),
        (
            {"rank": [8], "projector_start_step": 5, "projector": "subspace", "anchor": "static"},
            r"--mapl-projector-start-step 5 cannot be used with --mapl-projector subspace, .*leave",
        ),
        ({"rank": [8], "receive_ahead": -1}, r"--mapl-receive-ahead -1 must be"),
        ({"rank": [8], "projector": "none"}, r"--mapl-projector none .*give --mapl-anchor none"),
        (
            {"rank": [8], "projector": "fixed", "projector_exchange": "fp32"},
            r"--mapl-projector-exchange fp32 has no effect with --mapl-projector fixed",
        ),
        (
            {"rank": [8], "projector": "subspace"},
            r"--mapl-projector subspace needs --mapl-anchor static, not bigram: .*; add --mapl",
        ),
        (
            {"rank": [8, 0], "projector": "subspace", "anchor": "static"},
            r"--mapl-rank 8 0 with --mapl-projector subspace: .*; give one rank for all",
        ),
        (
            {"rank": [8, 16], "projector": "subspace", "anchor": "static"},
            r"--mapl-rank 8 16 with --mapl-projector subspace: .*; give one rank for all",
        ),
        (
            {
                "rank": [8],
                "projector": "subspace",
                "anchor": "static",
                "projector_lr_mult": 1.0,
            },
            r"--mapl-projector-lr-mult 1.0 has no effect with --mapl-projector subspace",
        ),
        (
            {
                "rank": [8],
                "codec_group_size": 32,
                "forward_codec": ["rvq"],
                "backward_codec": ["rvq"],
            },
            r"--mapl-codec-group-size 32 has no effect",
        ),
        (
            {"rank": [8], "codec_group_size": 0, "forward_codec": ["int8"]},
            r"--mapl-codec-group-size 0 must be at least 1",
        ),
        *(
            ({"rank": [8], name: value}, rf"--mapl-{name.replace('_', '-')} {value} has no effect")
            for name, value in {
                "rvq_groups": 2,
                "rvq_rounds": 2,
                "rvq_codes": 16,
                "rvq_decay": 0.9,
                "rvq_sync": "full",
                "rvq_sync_entries": 2,
                "rvq_order": "random",
            }.items()
        ),
        *(
            (
                {"rank": [8], "backward_codec": ["rvq"], "rvq_sync": "full", name: value},
                rf"--mapl-{name.replace('_', '-')} {value} has no effect with --mapl-rvq-sync full",
            )
            for name, value in {"rvq_sync_entries": 1, "rvq_order": "round-robin"}.items()
        ),
        (
            {"rank": [8], "forward_codec": ["rvq"], "rvq_codes": 100},
            r"--mapl-rvq-codes 100 must be a power of two",
        ),
        ({"rank": [8], "topk": 4}, r"--mapl-topk 4 has no effect without topk; leave it out"),
        ({"rank": [8], "backward_codec": ["topk"]}, r"--mapl-topk is missing: .*give --mapl-topk"),
        ({"rank": [8], "forward_codec": ["topk"], "topk": 0}, r"--mapl-topk 0 must keep at least"),
        (
            {"rank": [8], "lowrank_q": 4},
            r"--mapl-lowrank-q 4 has no effect without lowrank; leave it out, or give --mapl-back",
        ),
        (
            {"rank": [8], "backward_codec": ["lowrank"]},
            r"--mapl-lowrank-q is missing: .*give --mapl-lowrank-q Q .*or name another codec",
        ),
        (
            {"rank": [8], "backward_codec": ["lowrank"], "lowrank_q": 0},
            r"--mapl-lowrank-q 0 must be at least 1",
        ),
        (
            {"rank": [8], "forward_codec": ["int8", "lowrank"], "lowrank_q": 4},
            r"--mapl-forward-codec lowrank: it is for gradients.*give --mapl-backward-codec",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaplConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "boundaries", "message"),
    [
        ({"rank": [8]}, 0, r"a pipeline of one stage has no boundary"),
        ({"rank": [8, 8]}, 3, r"gives 2 ranks for 3 boundaries"),
        ({"rank": [65]}, 3, r"exceeds --hidden-size 64"),
        ({"rank": [8], "anchor_rank": 65}, 3, r"--mapl-anchor-rank 65 exceeds --hidden-size 64"),
        (
            {"rank": [32], "projector": "none", "anchor": "none"},
            3,
            r"--mapl-rank 32 with --mapl-projector none: .*give the --hidden-size, 64, or 0",
        ),
        (
            {"rank": [8], "forward_codec": ["int8", "int4"]},
            3,
            r"--mapl-forward-codec int8 int4 gives 2 codecs for 3 boundaries; give one",
        ),
        (
            {"rank": [8, 0, 8], "backward_codec": ["int8", "int4", "int8"]},
            3,
            r"--mapl-backward-codec int8 int4 int8 names int4 for boundary 1, which --mapl-rank 0",
        ),
        (
            {"rank": [9], "forward_codec": ["rvq"], "rvq_groups": 2},
            3,
            r"--mapl-rvq-groups 2 does not divide the 9 numbers",
        ),
        (
            {"rank": [9, 8, 9], "backward_codec": ["topk"], "topk": 9},
            3,
            r"--mapl-topk 9 exceeds the 8 numbers of a row; it is at most 8",
        ),
        (
            {"rank": [9, 8, 9], "backward_codec": ["lowrank"], "lowrank_q": 9},
            3,
            r"--mapl-lowrank-q 9 exceeds the 8 numbers of a row; it is at most 8",
        ),
        (
            {**FROZEN, "rank": [8], "projector_start_step": 14},
            3,
            r"-start-step 14 .* boundary 2 in step 16, after --mapl-rvq-sync frozen .*in step 16, "
            r".*start earlier, or use --mapl-rvq-sync streaming",
        ),
        (
            {**FROZEN, "rank": [0, 8, 0], "projector_start_step": 15},
            3,
            r"-start-step 15 .* boundary 1 in step 16, after --mapl-rvq-sync frozen",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(
    settings: dict[str, Any], boundaries: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_boundaries(MaplConfig(**settings), hidden_size=64, boundaries=boundaries)


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"rank": [8]}, (None, None, None)),
        ({"rank": [8], "projector_start_step": 5}, (5, 6, 7)),
        ({"rank": [8, 0, 16], "projector_start_step": 5}, (5, None, 7)),
        ({**FROZEN, "rank": [8], "projector_start_step": 13}, (13, 14, 15)),
        # Only codebooks are learned for one projector.
        (
            {**FROZEN, "rank": [8, 8, 0], "projector_start_step": 15}
            | {"forward_codec": ["rvq", "int8", "pipeline"]},
            (15, 16, None),
        ),
    ],
)
def test_projectors_start_one_a_step(
    settings: dict[str, Any], starts: tuple[int | None, ...]
) -> None:
    """Each in step N and its own number, whether those before it have one or not."""
    plan = plan_boundaries(MaplConfig(**settings), hidden_size=64, boundaries=3)
    assert plan.projector_starts == starts


def test_one_rank_serves_all_boundaries_and_a_list_each_its_own() -> None:
    plan = plan_boundaries(MaplConfig(rank=[8]), hidden_size=64, boundaries=3)
    assert plan.ranks == (8, 8, 8) and plan.anchor_rank == 16
    plan = plan_boundaries(
        MaplConfig(rank=[8, 0, 64], anchor_rank=32), hidden_size=64, boundaries=3
    )
    assert plan.ranks == (8, 0, 64) and plan.anchor_rank == 32
    assert [plan.width(boundary) for boundary in range(3)] == [8, 64, 64]


def test_one_codec_serves_all_compressed_boundaries_and_a_list_each_its_own() -> None:
    config = MaplConfig(rank=[8, 0, 8], forward_codec=["int4"], backward_codec=["rvq"])
    plan = plan_boundaries(config, hidden_size=64, boundaries=3)
    assert plan.forward_codecs == ("int4", "pipeline", "int4")
    assert plan.backward_codecs == ("rvq", "pipeline", "rvq")
    config = MaplConfig(rank=[8], forward_codec=["int4", "pipeline", "int8"])
    plan = plan_boundaries(config, hidden_size=64, boundaries=3)
    assert plan.forward_codecs == ("int4", "pipeline", "int8")


def test_topk_need_not_fit_where_it_is_not_used() -> None:
    codecs: dict[str, Any] = {"forward_codec": ["topk", "pipeline", "topk"], "topk": 9}
    config = MaplConfig(rank=[9, 8, 64], **codecs)
    plan = plan_boundaries(config, hidden_size=64, boundaries=3)
    assert plan.forward_codecs == ("topk", "pipeline", "topk")
    assert config.codec_settings.topk == 9


def test_lowrank_need_not_fit_where_it_is_not_used() -> None:
    codecs: dict[str, Any] = {"backward_codec": ["lowrank", "int8", "lowrank"], "lowrank_q": 9}
    config = MaplConfig(rank=[9, 8, 64], **codecs)
    plan = plan_boundaries(config, hidden_size=64, boundaries=3)
    assert plan.backward_codecs == ("lowrank", "int8", "lowrank")
    assert config.codec_settings.lowrank_q == 9


def test_rows_too_wide_for_topk() -> None:
    settings: dict[str, Any] = {"projector": "none", "anchor": "none", "forward_codec": ["topk"]}
    for width, fits in ((65536, True), (65537, False)):
        config = MaplConfig(rank=[width], topk=4, **settings)
        if fits:
            plan_boundaries(config, hidden_size=width, boundaries=1)
            continue
        with pytest.raises(ValueError, match=r"--mapl-topk 4: places in rows of 65537 .*65536"):
            plan_boundaries(config, hidden_size=width, boundaries=1)


def test_shares_of_entries_must_fit_the_codebook() -> None:
    """Known before the model is built."""
    config = MaplConfig(rank=[8], forward_codec=["rvq"], rvq_codes=4, rvq_sync_entries=2)
    plan_boundaries(config, hidden_size=64, boundaries=1, shards=2)
    with pytest.raises(ValueError, match="--mapl-rvq-sync-entries 2: 4 processes"):
        plan_boundaries(config, hidden_size=64, boundaries=1, shards=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emulate_bandwidth": 0.0}, "--mapl-emulate-bandwidth 0.0 must be a positive"),
        ({"emulate_bandwidth": float("nan")}, "--mapl-emulate-bandwidth nan must be"),
        ({"emulate_latency": -1.0}, "--mapl-emulate-latency -1.0 must be a number of milli"),
    ],
)
def test_emulated_networks_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmulationConfig(**settings)
