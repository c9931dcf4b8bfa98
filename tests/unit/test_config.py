# SPDX-License-Identifier: Apache-2.0
"""Settings: every bad one gives an error that names the flag, the value and the remedy."""

from typing import Any

import pytest

from mapl.config import MaplConfig


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
    ],
)
def test_settings_that_do_not_fit_the_model(
    settings: dict[str, Any], boundaries: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaplConfig(**settings).plan(hidden_size=64, boundaries=boundaries)


def test_one_rank_serves_all_boundaries_and_a_list_each_its_own() -> None:
    plan = MaplConfig(rank=[8]).plan(hidden_size=64, boundaries=3)
    assert plan.ranks == (8, 8, 8) and plan.anchor_rank == 16
    plan = MaplConfig(rank=[8, 0, 64], anchor_rank=32).plan(hidden_size=64, boundaries=3)
    assert plan.ranks == (8, 0, 64) and plan.anchor_rank == 32
    assert [plan.width(boundary) for boundary in range(3)] == [8, 64, 64]
