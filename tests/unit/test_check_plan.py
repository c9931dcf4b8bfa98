# SPDX-License-Identifier: Apache-2.0
"""check_plan.py: predictions held against a bench."""

from pathlib import Path

import pytest

import check_plan
import plan_settings
import slow_network_plan as bench
from pipeline_step import Direction, Link
from plan_prediction import Machine, predict, unlimited_seconds
from plan_settings import Setting
from slow_network_results import Results, Timing
from tests.unit.plan_cases import DOCS, ROOT


def test_errors_of_predictions_are_those_of_the_table() -> None:
    """What the model itself says comes out as exact; a bench that was slower shows by how much."""
    sizes = bench.Sizes()
    job = check_plan.job_of(sizes)
    flags = " ".join(sizes.flags())
    assert f"--num-layers {job.num_layers} " in flags and f"--ffn-hidden-size {job.ffn_width} " in (
        flags
    )
    flops = 1e10
    data = Results(sizes, {"cores": "2"}, 15, goodput={5: 4.7})
    for name, late in (("uncompressed", 1.0), ("MAPL d/8", 1.25)):
        setting = {s.name: s for s in bench.settings(sizes.hidden)}[name]
        read = Setting(name, plan_settings.read(setting.flags.split()))
        side = Direction(4.7e6, 0.0)
        slow = predict(job, read, Machine(flops, (Link(side, side),) * 3, 2.0)).seconds
        data.timings.append(Timing(name, 5, "shaped", [late * slow]))
        unlimited = unlimited_seconds(job, read, 2.0) / flops
        data.timings.append(Timing(name, None, "shaped", [unlimited]))
    rows = check_plan.check(data)
    assert [row.error for row in rows] == [pytest.approx(0), pytest.approx(1 / 1.25 - 1)]
    assert "median 10.0%, largest 20.0% (MAPL d/8 at 5 Mbit/s), 2 rows" in check_plan.page(
        rows, markdown=False
    )


def test_what_check_plan_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slow_network.json"
    empty = Results(bench.Sizes(), {"cores": "2"}, 15).to_json()
    for content, message in (
        (None, "No such file"), ("{}", "is not what"), (empty, "no uncompressed run on an unlim"),
    ):  # fmt: skip
        if content is not None:
            path.write_text(content)
        assert check_plan.main([str(path)]) == 2
        assert message in capsys.readouterr().err


def test_the_docs_state_the_errors_of_the_bench() -> None:
    results = Results.from_json((ROOT / "docs" / "planning-bench.json").read_text())
    table, errors = check_plan.page(check_plan.check(results), markdown=True).split("\n\n")
    assert table in DOCS
    assert errors in DOCS.replace("\n", " ")
