# SPDX-License-Identifier: Apache-2.0
"""report.py --geometry: fabricated lines of metrics in, a picture out."""

import json
import math
import struct
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import report
import report_geometry
from mapl.files import METRICS_FILE
from report_files import ReportError
from test_report import write_report


def measured(boundary: int, step: int, *, learns: bool = True) -> dict[str, Any]:
    """Figures that a run could have, r = 32 of d = 256."""
    risen = 1 - math.exp(-step / 300) if learns else 0.0
    return {
        "boundary": boundary,
        "rank": 32,
        "tokens": 2048,
        "energy_kept": 0.13 + (0.6 - 0.05 * boundary) * risen,
        "energy_ceiling": 0.88 - 0.04 * boundary,
        "energy_random": 0.125,
        "rank_99": 140.5 + 12 * boundary - step / 50,
        "cosine_pearson": 0.9 + 0.09 * risen - 0.01 * boundary,
    }


def geometry(step: int, *, boundaries: int = 3, learns: bool = True) -> dict[str, Any]:
    degrees = 60.0 if learns else 0.0
    return {
        "boundaries": [measured(b, step, learns=learns) for b in range(boundaries)],
        "angles": [
            {
                "boundaries": [p, q],
                "mean_degrees": degrees * (1 - math.exp(p - q)),
                "smallest_degrees": 0.5,
            }
            for p, q in combinations(range(boundaries), 2)
        ],
    }


def write_measured(directory: Path, *, boundaries: int = 3, learns: bool = True) -> Path:
    """1000 steps with a line every 50, of which every second has geometry."""
    write_report(directory, boundaries=boundaries)
    lines: list[dict[str, Any]] = [
        {"iteration": step, "loss": 8 - step / 500} for step in range(50, 1001, 50)
    ]
    for line in lines[1::2]:
        line["geometry"] = geometry(line["iteration"], boundaries=boundaries, learns=learns)
    text = "\n".join(map(json.dumps, lines))
    (directory / METRICS_FILE).write_text(text + "\n")
    return directory


def test_load(tmp_path: Path) -> None:
    directory = write_measured(tmp_path / "learned")
    path = directory / METRICS_FILE
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["geometry"]["boundaries"][1]["cosine_pearson"] = None
    del changed["geometry"]["boundaries"][2]
    path.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + '\n{"iteration": 10')
    run = report_geometry.load(directory, "learned")
    assert run.name == "learned" and run.steps == list(range(100, 1001, 100))
    assert run.kept[1][3] == measured(1, 400)["energy_kept"]
    assert run.ceiling[2][-1] == 0.8 and run.random[0][0] == 0.125
    assert run.rank_99[0][0] == 138.5 and run.ranks == {0: 32, 1: 32, 2: 32}
    assert math.isnan(run.pearson[1][0]) and run.pearson[1][1] == measured(1, 200)["cosine_pearson"]
    assert math.isnan(run.kept[2][0]) and not math.isnan(run.kept[2][1])
    assert run.angles == {
        (0, 1): 60 * (1 - math.exp(-1)),
        (0, 2): 60 * (1 - math.exp(-2)),
        (1, 2): 60 * (1 - math.exp(-1)),
    }


@pytest.mark.parametrize(("number", "boundaries"), [(1, 1), (2, 3), (3, 15)])
def test_draw_writes_a_whole_png(tmp_path: Path, number: int, boundaries: int) -> None:
    runs = [
        report_geometry.load(
            write_measured(tmp_path / f"run-{n}", boundaries=boundaries, learns=n != 1), f"run-{n}"
        )
        for n in range(number)
    ]
    report_geometry.draw(runs, tmp_path / "deep" / "geometry.png")
    content = (tmp_path / "deep" / "geometry.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1400 and height > 1000
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["geometry.png"]


def test_command_line_draws_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_measured(tmp_path / "learned")
    out, second = tmp_path / "out.png", tmp_path / "geometry.png"
    assert report.main([str(run), "--output", str(out)]) == 0
    assert out.exists() and not second.exists()
    capsys.readouterr()
    assert report.main([str(run), "--output", str(out), "--geometry", str(second)]) == 0
    assert f"drawn in {out} and {second}" in capsys.readouterr().out
    assert second.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"iteration": 1, "loss": 8.0}, "no line with geometry; train with --mapl-geometry-int"),
        ({"iteration": 1, "loss": 8.0, "geometry": {"boundaries": [{}]}}, "no geometry that can"),
        ({"iteration": 1, "loss": 8.0, "geometry": []}, "no geometry that can be read"),
        (None, "mapl_metrics.jsonl does not exist"),
    ],
)
def test_a_run_without_geometry_is_one_line_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, message: str
) -> None:
    run = write_report(tmp_path / "run")
    if line is not None:
        (run / METRICS_FILE).write_text(json.dumps(line) + "\n")
    out = tmp_path / "geometry.png"
    assert report.main([str(run), "--geometry", str(out), "--output", str(tmp_path / "o.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists() and not (tmp_path / "o.png").exists()
    with pytest.raises(ReportError, match="mapl_metrics"):
        report_geometry.load(run, "run")
