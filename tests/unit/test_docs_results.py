# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/results.md say what the results.json beside it say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import report
import sweep

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def _section(title: str) -> str:
    _, _, rest = (DOCS / "results.md").read_text().partition(f"\n## {title}")
    assert rest, title
    return rest.partition("\n## ")[0]


def _numbers(cell: str) -> list[float]:
    return [float(n.replace("−", "-")) for n in re.findall(r"[+−]?\d+\.\d+", cell)]


@pytest.mark.parametrize(
    ("title", "corpus", "least"), [("Source code", "source", 6), ("English text", "english", 9)]
)
def test_tables_are_those_of_the_runs(title: str, corpus: str, least: int) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((DOCS / "results" / corpus / "results.json").read_text()):
        if row["state"] == "finished":
            rows.setdefault(row["setting"], []).append(row)
    section, found = _section(title), set()
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[1].strip("`") not in rows:
            continue
        runs = sorted(rows[cells[1].strip("`")], key=lambda run: run["seed"])
        found.add(cells[1].strip("`"))
        assert _numbers(cells[2]) == pytest.approx([runs[0]["ratio"]], abs=0.005)
        assert _numbers(cells[3]) == pytest.approx([run["loss"] for run in runs], abs=5e-5)
        assert _numbers(cells[4]) == pytest.approx([run["gap"] for run in runs], abs=0.0051)
    assert len(found) >= least and found == rows.keys() - {"uncompressed"}
    text = re.sub(r"\s+", " ", section)
    for run in rows["uncompressed"]:
        assert f"{run['loss']:.4f}" in text


def test_the_table_of_all_runs_has_them_all() -> None:
    def runs(path: Path, text: str, optimizer: str) -> set[tuple[str, ...]]:
        return {
            (text, optimizer, row["setting"], str(row["seed"]), f"{row['loss']:.4f}",
             f"{row['gap']:+.2f}%".replace("-", "−"))
            for row in json.loads(path.read_text())
            if row["state"] == "finished"
        }  # fmt: skip

    results = DOCS / "results"
    expected = (
        runs(results / "source" / "results.json", "source", "Muon")
        | runs(results / "english" / "results.json", "English", "Muon")
        | runs(results / "adam" / "results.json", "source", "Adam")
        | runs(ROOT / "tools" / "plan_gaps.json", "source", "Muon")
    )
    found = set()
    for line in _section("All runs").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0] in ("source", "English"):
            text, _, optimizer, run, seed, _, loss, gap = cells
            found.add((text, optimizer, run, seed, loss, gap))
    assert found == expected


@pytest.mark.parametrize(
    ("corpus", "listed"), [("source", "headline"), ("english", "short"), ("adam", "adam")]
)
def test_tables_are_made_again_from_what_is_kept(corpus: str, listed: str, tmp_path: Path) -> None:
    kept, made = DOCS / "results" / corpus, tmp_path / corpus
    shutil.copytree(kept, made)
    for file in made.glob("*.*"):
        file.unlink()
    path = ROOT / "tools" / "sweeps" / f"{listed}.toml"
    assert sweep.main([str(path), "--output", str(made), "--report-only"]) == 0
    for name in ("results.json", "results.md"):
        assert (made / name).read_text() == (kept / name).read_text()
    assert (made / "pareto.png").exists() and (made / "losses.png").exists()


def test_the_picture_of_the_geometry_is_made_again(tmp_path: Path) -> None:
    runs = [DOCS / "results" / "geometry" / run / "report" for run in ("learned", "fixed")]
    picture = tmp_path / "geometry.png"
    report.main([*map(str, runs), "--output", str(tmp_path / "r.png"), "--geometry", str(picture)])
    assert picture.exists()
    lines = [json.loads(line) for line in (runs[0] / "mapl_metrics.jsonl").open()]
    (last,) = [line["geometry"] for line in lines if line["iteration"] == 600]
    page = (DOCS / "geometry.md").read_text()
    for boundary in last["boundaries"]:
        row = rf"\| {boundary['boundary']} \| {boundary['energy_kept']:.3f} \|.*"
        assert re.search(
            row + rf"{boundary['rank_99']:.0f} \| {boundary['cosine_pearson']:.3f}", page
        )
