# SPDX-License-Identifier: Apache-2.0
"""Every recipe of examples/llama trains, shrunken; also without boundaries, and the paper's."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from cluster import Cluster
from llama_example import (
    LLAMA,
    RECIPES,
    SHRUNKEN,
    SHRUNKEN_MAPL,
    SPLIT,
    environment,
    noted,
    stand_in,
)

#: As the README says, with the rank of the shrunken model.
PAPER = "--mapl-preset paper --mapl-rank 16".split()


def command(folder: Path, recipe: str, *words: str, **variables: str) -> list[str]:
    """What train.sh gives pretrain_gpt.py."""
    given = {**stand_in(folder, "nothing"), "SAVE": str(folder / "saved"), **variables}
    subprocess.run(
        [str(LLAMA / "train.sh"), recipe, *SHRUNKEN, *words], cwd=folder, env=environment(**given),
        check=True,
    )  # fmt: skip
    called: list[str] = noted(folder)["words"]
    script = next(i for i, word in enumerate(called) if word.endswith("pretrain_gpt.py"))
    return called[script + 1 :]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shrunken_recipe_trains_and_is_saved(
    cluster: Cluster, tmp_path: Path, recipe: str
) -> None:
    split = SPLIT.get(recipe, [])
    processes = 4 if split else 2
    result = cluster.run(processes, command(tmp_path, recipe, *split, *SHRUNKEN_MAPL))
    assert len(result.losses) == 4
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.losses[-1] < result.losses[0]
    saved = tmp_path / "saved"
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"
    traffic = json.loads((saved / "mapl_traffic.json").read_text())
    assert 4 < traffic["boundaries"][0]["ratio"] < 4.5
    assert list(saved.glob("events.out.tfevents.*"))
    assert "throughput per GPU (TFLOP/s/GPU)" in result.log


def test_the_papers_setting(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run(2, command(tmp_path, "150m", "--num-layers", "2", *PAPER))
    assert len(result.losses) == 4
    for record in result.records:
        assert [[*table.shape] for table in record["anchors"][0].values()] == [[384, 16], [16, 64]]
    traffic = json.loads((tmp_path / "saved" / "mapl_traffic.json").read_text())
    assert traffic["boundaries"][0]["backward"]["scales"] == 0  # bf16, not int8 or int4


def test_plain_megatron_trains_by_a_recipe(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run(2, command(tmp_path, "150m", PLAIN="1"))
    assert len(result.losses) == 4
    assert not (tmp_path / "saved" / "mapl_traffic.json").exists()
