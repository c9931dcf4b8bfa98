# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/results.md say what the results.json beside it say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


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
    for row in json.loads((DOCS / f"results-{corpus}.json").read_text()):
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
