# SPDX-License-Identifier: Apache-2.0
"""Metrics of a real job: the file, TensorBoard, W&B and the log say the same."""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import Cluster, Result
from layouts import LAYOUTS
from test_layouts import RANK


@pytest.fixture(scope="module")
def result(cluster: Cluster) -> Result:
    """Four stages with everything that a line of metrics can have."""
    return cluster.run(
        4,
        LAYOUTS["pp4"].command(
            f"--mapl-rank {RANK} --mapl-log-interval 2 --mapl-geometry-interval 4",
            "--mapl-forward-codec rvq --mapl-rvq-codes 16 --mapl-projector-lr-mult 3",
            "--tensorboard-dir board",
            "--wandb-project project --wandb-exp-name run --wandb-save-dir wandb",
        ),
        tamper="record_wandb",
    )


def test_the_lines_of_metrics(result: Result) -> None:
    lines = result.metrics
    assert ["geometry" in line for line in lines] == [False, True]
    far, near = (
        {tuple(entry["boundaries"]): entry["mean_degrees"] for entry in angles}
        for angles in (lines[1]["geometry"]["angles"], lines[1]["angles"])
    )
    assert [*far] == [(0, 1), (0, 2), (1, 2)]
    assert near == pytest.approx({pair: far[pair] for pair in near}, abs=0.05)
    assert [line["iteration"] for line in lines] == [2, 4]
    assert lines[0]["loss"] == pytest.approx(sum(result.losses[:2]) / 2)
    for line in lines:
        assert [entry["boundary"] for entry in line["boundaries"]] == [0, 1, 2]
        assert [entry["boundaries"] for entry in line["angles"]] == [[0, 1], [1, 2]]
        for entry in line["boundaries"]:
            assert 0 < entry["energy_kept"] < 1
            assert entry["orthonormality_error"] < 1e-5
            assert entry["gradient_norm"] > 0
        assert all(0 < entry["mean_degrees"] < 90 for entry in line["angles"])
        assert [(c["boundary"], c["direction"]) for c in line["codebooks"]] == [
            (boundary, "forward") for boundary in range(3)
        ]
    assert lines[1]["sent_by_kind"]["ids"] == 2 * lines[0]["sent_by_kind"]["ids"] > 0


def test_traffic_and_time_add_up(result: Result) -> None:
    first, last = result.metrics
    for line in (first, last):
        by_boundary = line["sent_by_boundary"]
        assert [entry["boundary"] for entry in by_boundary] == [0, 1, 2]
        directions = ("forward", "backward", "projector")
        assert line["sent_bytes"] == sum(line["sent_by_kind"].values())
        assert line["sent_bytes"] == sum(e[d] for e in by_boundary for d in directions)
        assert line["uncompressed_bytes"] == sum(entry["uncompressed"] for entry in by_boundary)
    # The evaluations at the end come after the last line.
    assert last["sent_bytes"] < result.traffic["total"]["sent"]
    # Time and time in communication have the evaluations, too.
    times = [report["seconds"] for report in (first, last, result.traffic)]
    for seconds in times:
        communication = seconds["communication"]
        assert 0 < communication["mean"] <= communication["max"] <= seconds["after_first_step"]
    for before, after in pairwise(times):
        assert before["after_first_step"] < after["after_first_step"]
        assert before["communication"]["mean"] < after["communication"]["mean"]


def test_tensorboard_and_wandb_get_every_figure_of_the_file(result: Result) -> None:
    events = EventAccumulator(str(result.folder / "board"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("mapl/")]
    board = {(e.step, tag): e.value for tag in tags for e in events.Scalars(tag)}
    noted = [
        (step, {name: value for name, value in figures.items() if name.startswith("mapl/")})
        for step, figures in result.records[-1]["wandb"]
    ]
    wandb = {(step, name): value for step, named in noted for name, value in named.items()}
    # TensorBoard keeps fp32.
    assert board == pytest.approx(wandb, rel=1e-6)
    assert not any(record["wandb"] for record in result.records[:-1])
    for line in result.metrics:
        named = {name: value for (step, name), value in wandb.items() if step == line["iteration"]}
        in_file = sorted(figures({k: v for k, v in line.items() if k != "iteration"}))
        assert sorted(named.values()) == in_file  # none is missing, none is there twice
    last = result.metrics[-1]
    geometry = last["geometry"]
    expected = {
        "loss": last["loss"],
        "ratio": last["ratio"],
        "sent/indices": last["sent_by_kind"]["indices"],
        "seconds/after-first-step": last["seconds"]["after_first_step"],
        "seconds/communication-max": last["seconds"]["communication"]["max"],
        "boundary-1/energy-kept": last["boundaries"][1]["energy_kept"],
        "boundary-2/sent/backward": last["sent_by_boundary"][2]["backward"],
        "boundary-2/forward-perplexity": last["codebooks"][2]["perplexity"],
        "boundary-0/forward-dead": last["codebooks"][0]["dead"],
        "angle-1-2/smallest-degrees": last["angles"][1]["smallest_degrees"],
        "geometry/boundary-2/cosine-pearson": geometry["boundaries"][2]["cosine_pearson"],
        "geometry/angle-0-2/mean-degrees": geometry["angles"][1]["mean_degrees"],
    }
    assert {name: wandb[4, f"mapl/{name}"] for name in expected} == expected


def figures(value: Any) -> Iterator[float]:
    """All numbers in a line of metrics, without those that say which boundary it is about."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "boundary":
                yield from figures(inner)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):  # the numbers of "boundaries" stand in lists by themselves
                yield from figures(inner)
    elif isinstance(value, int | float):
        yield value


def test_the_log_has_a_line_in_megatrons_manner(result: Result) -> None:
    """On the same rank, below Megatron's own, `name: value |` after the same beginning."""
    log = (result.folder / "log.3").read_text().splitlines()
    beginning = re.compile(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration +(\d+)/ +4 \| ")
    lines = [(int(found[1]), line) for line in log if (found := beginning.match(line))]
    own = [(step, line) for step, line in lines if "boundary traffic" in line]
    assert [step for step, _ in lines] == [1, 2, 2, 3, 4, 4]
    assert [step for step, _ in own] == [2, 4] and own[0] == lines[2] and own[1] == lines[5]
    assert result.log.count("boundary traffic") == 2
    for (_, text), line in zip(own, result.metrics, strict=True):
        said = dict(re.findall(r"([^|:]+): +([\d.E+-]+)%? \|", text.split("|", 1)[1]))
        values = {name.strip(): float(value) for name, value in said.items()}
        energies = [entry["energy_kept"] for entry in line["boundaries"]]
        assert values.pop("energy kept") == pytest.approx(sum(energies) / 3, abs=6e-4)
        assert values.pop("boundary traffic (MB)") == round(line["sent_bytes"] / 1e6, 1)
        assert values.pop("traffic ratio") == round(line["ratio"], 2)
        assert values.pop("communication time per iteration (ms)") > 0
        worst = max(entry["orthonormality_error"] for entry in line["boundaries"])
        assert math.isclose(values.pop("orthonormal to"), worst, rel_tol=0.06)
        assert values.pop("number of skipped projector steps") == 0
        perplexities = [entry["perplexity"] for entry in line["codebooks"]]
        assert values.pop("codebook perplexity") == pytest.approx(sum(perplexities) / 3, abs=0.06)
        dead = max(entry["dead"] for entry in line["codebooks"])
        assert values.pop("dead codes") == pytest.approx(100 * dead, abs=0.06)
        assert not values, "the log says something that no test looks at"
