# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of results say what docs/results holds of the runs."""

import argparse
import json
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import report
import sweep
import sweep_list
from mapl.anchors import build_anchor
from mapl.config import MaplConfig

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def _after(page: str, title: str) -> str:
    """The section of a page whose title begins so."""
    _, _, rest = page.partition(f"\n## {title}")
    assert rest, title
    return rest.partition("\n## ")[0]


def _section(title: str) -> str:
    return _after((DOCS / "results.md").read_text(), title)


def _runs(corpus: str) -> list[dict[str, Any]]:
    """The finished runs that docs/results keeps."""
    rows = json.loads((DOCS / "results" / corpus / "results.json").read_text())
    return [row for row in rows if row["state"] == "finished"]


def _source(*corpora: str) -> dict[str, dict[str, Any]]:
    """Runs on source code with the first seed, by setting; of a setting in several, the first."""
    rows = [row for corpus in reversed(corpora or ("source",)) for row in _runs(corpus)]
    return {row["setting"]: row for row in rows if row["seed"] == 1234}


def _anchors() -> list[dict[str, Any]]:
    """Runs of anchors.toml that headline.toml has not."""
    headline = [row["setting"] for row in _runs("source")]
    return [row for row in _runs("anchors") if row["setting"] not in headline]


def _gaps_at_evaluations(corpus: str, setting: str, seed: int = 1234) -> list[str]:
    def losses(name: str) -> list[float]:
        seeded = DOCS / "results" / corpus / f"{name}-s{seed}"
        folder = seeded if seeded.exists() else seeded.with_name(name)
        result = json.loads((folder / "result.json").read_text())
        return [loss for _, loss in result["validation"]]

    pairs = zip(losses(setting), losses("uncompressed"), strict=True)
    return [_percent(100 * (own / base - 1)) for own, base in pairs]


def _mean_gaps(corpus: str) -> dict[str, float]:
    """Setting → mean over its seeds."""
    gaps: dict[str, list[float]] = {}
    for row in _runs(corpus):
        gaps.setdefault(row["setting"], []).append(row["gap"])
    return {setting: mean(own) for setting, own in gaps.items()}


def _percent(number: float) -> str:
    return f"{number:+.2f}%".replace("-", "−")


def _numbers(cell: str) -> list[float]:
    return [float(n.replace("−", "-")) for n in re.findall(r"[+−]?\d+\.\d+", cell)]


@pytest.mark.parametrize(
    ("title", "corpus"),
    [("Source code", "source"), ("English text", "english"), ("Plain Adam", "adam")],
)
def test_tables_are_those_of_the_runs(title: str, corpus: str) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _runs(corpus):
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
    assert found == rows.keys() - {"uncompressed"}
    text = re.sub(r"\s+", " ", section)
    for run in rows["uncompressed"]:
        assert f"{run['loss']:.4f}" in text


def test_the_table_of_all_runs_has_them_all() -> None:
    search = _runs("search")
    (base,) = [row["loss"] for row in search if row["setting"] == "uncompressed"]
    expected = [
        *(("source", "Muon", row) for row in _runs("source") + _anchors()),
        *(("English", "Muon", row) for row in _runs("english")),
        *(("source", "Adam", row) for row in _runs("adam")),
        *(("source", "Muon", row) for row in search),
    ]
    for row in _runs("geometry"):
        gap = 100 * (row["loss"] / base - 1)
        expected.append(
            ("source", "Muon", row | {"gap": gap, "setting": f"{row['setting']} in bf16"})
        )
    lines = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in _section("All runs").splitlines()
    ]
    found = {tuple(line[:5]): line[5:] for line in lines if line[0] in ("source", "English")}
    assert len(found) == len(expected) == sum(line[0] in ("source", "English") for line in lines)
    for text, optimizer, row in expected:
        tokens = f"{row['tokens'] / 1e6:.0f} M"
        ratio, loss, gap = found[text, tokens, optimizer, row["setting"], str(row["seed"])]
        if row["ratio"] is not None:
            assert ratio == f"{row['ratio']:.2f}×"
        assert loss == f"{row['loss']:.4f}"
        assert gap == _percent(row["gap"])


#: Settings in the order of README's table.
_OF_README = (
    "mapl-4x", "mapl-8x", "mapl-16x", "mapl-2x", "factorized-4x", "factorized-8x",
    "paper-4x", "paper-8x", "paper-16x", "direct-int8", "direct-int4", "subspace-4x",
)  # fmt: skip


def _percent_or_dash(number: float | None) -> str:
    return "–" if number is None else _percent(number)


def test_readme_and_guide_say_the_same() -> None:
    """Means over seeds, of source code and of English."""
    gaps = {corpus: _mean_gaps(corpus) for corpus in ("source", "english")}
    ratios = {name: row["ratio"] for name, row in _source().items()}
    readme, guide = (ROOT / "README.md").read_text(), (DOCS / "choosing.md").read_text()
    (table,) = re.findall(r"(?:^\|.*\n)+", _after(readme, "Quality at"), flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for name, (setting, ratio, source, english) in zip(_OF_README, rows[2:], strict=True):
        assert ratio == f"{ratios[name]:.1f}×"
        assert source.split()[0] == _percent(gaps["source"][name]), setting
        assert english == _percent_or_dash(gaps["english"].get(name))
    for ratio in (2, 4, 8, 16):
        (line,) = [line for line in guide.splitlines() if line.startswith(f"| {ratio}× |")]
        assert [cell.strip() for cell in line.strip("|").split("|")[-2:]] == [
            _percent_or_dash(gaps[corpus].get(f"mapl-{ratio}x")) for corpus in ("source", "english")
        ]


def test_the_log_of_the_search_has_its_gaps() -> None:
    """Flags of tools/sweeps/search.toml, figures of docs/search.md."""
    listed = sweep_list.read(ROOT / "tools" / "sweeps" / "search.toml", None, to_run=False)
    flags = {run.setting: list(run.flags) for run in listed.runs}
    rows = {row["setting"]: row for row in _runs("search")}
    assert rows and all(row["flags"] == flags[name] for name, row in rows.items())
    found = 0
    for line in (DOCS / "search.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = cells[0].strip("`")
        if name in rows and cells[-1].endswith("%"):
            gap = float(cells[-1].rstrip("%").replace("−", "-"))
            assert (rows[name]["loss"], rows[name]["gap"]) == (float(cells[-2]), gap)
            found += 1
    assert found >= len(rows) - 2  # but uncompressed, and lossless, of which the text speaks
    base = rows["uncompressed"]["loss"]
    for row in rows.values():
        assert row["gap"] == pytest.approx(100 * (row["loss"] / base - 1), abs=0.01)


def test_gaps_over_training_are_those_of_the_evaluations() -> None:
    found = 0
    for line in _section("Source code").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[1].endswith("%"):
            continue
        name, _, seed = cells[0].partition(", seed ")
        assert cells[1:] == _gaps_at_evaluations("source", name.strip("`"), int(seed or 1234))
        found += 1
    assert found == 13


def _table_parameters(flags: list[str]) -> int:
    """Of one stage, with 32,000 tokens and d = 768."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mapl-anchor", default=MaplConfig.anchor)
    parser.add_argument("--mapl-anchor-rank", type=int, default=768 // 4)
    parser.add_argument("--mapl-anchor-buckets", type=int)
    args, _ = parser.parse_known_args(flags)
    anchor = build_anchor(
        args.mapl_anchor,
        vocab_size=32000,
        hidden_size=768,
        anchor_rank=args.mapl_anchor_rank,
        buckets=args.mapl_anchor_buckets,
        generator=torch.Generator(),
    )
    return sum(parameter.numel() for parameter in anchor.parameters())


def test_what_wider_anchors_came_to() -> None:
    """Sizes of tables, and gaps, in docs/search.md."""
    section = _after((DOCS / "search.md").read_text(), "Wider anchors")
    settings = {"factorized-8x": "source", "mapl-8x": "anchors"}
    settings |= {row["setting"]: "anchors" for row in _anchors()}
    rows = _source("source", "anchors")
    for name, corpus in settings.items():
        (line,) = re.findall(rf"^\| `{name}` \| (.*) \|$", section, re.MULTILINE)
        _, parameters, _, before, last = line.split(" | ")
        assert parameters == f"{_table_parameters(rows[name]['flags']) / 1e6:.1f} M"
        assert [*before.split(", "), last] == _gaps_at_evaluations(corpus, name)
    trained = {name: mean(loss for _, loss in rows[name]["curve"][-10:]) for name in rows}
    above = [
        _percent(100 * (trained[name] / trained["uncompressed"] - 1))
        for name in ("bigram-full-8x", "mapl-8x")
    ]
    said = f"({above[0]} and {above[1]}, means over the last 100 steps)"
    assert said in re.sub(r"\s+", " ", section)


def test_runs_that_two_lists_share_are_the_same() -> None:
    source, anchors = (
        {path.relative_to(folder): path.read_text() for path in folder.glob("*/*.json")}
        for folder in (DOCS / "results" / "source", DOCS / "results" / "anchors")
    )
    shared = source.keys() & anchors.keys()
    assert len(shared) == 2 * 4  # two files each: two seeds of two settings
    assert all(source[path] == anchors[path] for path in shared)


def test_the_guide_says_what_wider_anchors_came_to() -> None:
    gaps = {name: row["gap"] for name, row in _source("source", "anchors").items()}
    text = re.sub(r"\s+", " ", (DOCS / "choosing.md").read_text())
    for said, one, other in (
        ("points worse than the defaults at", "bigram-full-8x", "mapl-8x"),
        ("points worse at as many", "bigram-full-8192-8x", "mapl-8x"),
        ("points better than factorised ones", "factorized-8x", "full-8x"),
        ("points worse than the defaults, with", "full-8x", "mapl-8x"),
    ):
        assert f" {gaps[one] - gaps[other]:.1f} {said}" in text


@pytest.mark.parametrize(
    ("corpus", "listed"),
    [
        ("source", "headline"),
        ("anchors", "anchors"),
        ("english", "short"),
        ("adam", "adam"),
        ("geometry", "geometry"),
    ],
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
    for picture in kept.glob("*.png"):
        assert (made / picture.name).exists() or picture.name == "geometry.png"


def test_the_picture_of_the_geometry_is_made_again(tmp_path: Path) -> None:
    runs = [DOCS / "results" / "geometry" / run / "report" for run in ("learned", "fixed")]
    picture = tmp_path / "geometry.png"
    report.main([*map(str, runs), "--output", str(tmp_path / "r.png"), "--geometry", str(picture)])
    assert picture.exists()
    last, last_fixed = (
        json.loads((run / "mapl_metrics.jsonl").read_text().splitlines()[-1])["geometry"]
        for run in runs
    )
    page = (DOCS / "geometry.md").read_text()
    for boundary, fixed in zip(last["boundaries"], last_fixed["boundaries"], strict=True):
        row = rf"\| {boundary['boundary']} \| {boundary['energy_kept']:.3f} \| "
        row += rf"{fixed['energy_kept']:.3f} \| {boundary['energy_ceiling']:.3f} \| "
        row += rf"{boundary['rank_99']:.0f} \| {boundary['cosine_pearson']:.3f} \| "
        assert re.search(row + rf"{fixed['cosine_pearson']:.3f} \|", page)


def test_each_baseline_loses_more_than_one_of_ours_that_sends_fewer_bytes() -> None:
    rows = _source()
    ours = [rows[name] for name in ("mapl-2x", "mapl-4x", "mapl-8x", "mapl-8x-fixed", "mapl-16x")]
    others = {"uncompressed", "bigram-1x", "factorized-4x", "factorized-8x"}
    baselines = [row for row in rows.values() if row not in ours and row["setting"] not in others]
    listed = (ROOT / "tools" / "sweeps" / "headline.toml").read_text()
    assert len(baselines) + len(ours) + len(others) == listed.count("[[run]]")
    for row in baselines:
        better = [own for own in ours if own["ratio"] > row["ratio"] and own["gap"] < row["gap"]]
        assert better, row["setting"]


def test_budgets_are_summed_up_as_measured() -> None:
    """The table of what others and ours lose at about one ratio, means over seeds."""
    gaps = _mean_gaps("source")
    about = dict(re.findall(r"^\| (\d+×) \| (.*) \|$", _section("Source code"), re.MULTILINE))

    def said(*names: str) -> list[float]:
        return [round(gaps[name], 2) for name in names]

    def read(ratio: str) -> list[float]:
        cell = about[ratio].replace("−", "-")
        return [float(number) for number in re.findall(r"(-?\d+(?:\.\d+)?)%", cell)]

    assert read("2×") == said("direct-int8", "direct-fp8", "lowrank-64", "mapl-2x")
    four = ("paper-4x", "direct-int4", "subspace-4x", "mapl-4x", "factorized-4x")
    assert read("4×") == said(*four)
    paper, least, most, topk, ours, factorized = read("8×")
    variants = ("fixed-8x", "unconstrained-8x", *(f"anchor-{a}-8x" for a in ("none", "static")))
    assert [paper, ours, factorized] == said("paper-8x", "mapl-8x", "factorized-8x")
    assert [least, most] == [
        bound(said(*variants, "anchor-full-8x")) for bound in (min, max)
    ] and topk == round(gaps["topk-8x"])
    assert read("16×") == said("paper-16x", "mapl-16x")


def test_outcomes_in_the_log_are_those_of_the_runs() -> None:
    rows = _source()
    table = _after((DOCS / "search.md").read_text(), "At 101 M tokens")
    found = re.findall(r"^\| `(.*?)` \| .*? \| ([+−].*?%) \|", table, re.MULTILINE)
    assert len(found) == 16
    for name, gap in found:
        assert gap == _percent(rows[name]["gap"]), name


def test_gaps_to_the_better_model_are_those_of_the_runs() -> None:
    rows = _source()
    names = ("mapl-2x", "mapl-4x", "mapl-8x", "mapl-16x")
    gaps = [f"{100 * (rows[name]['loss'] / rows['bigram-1x']['loss'] - 1):.1f}%" for name in names]
    two, four, eight, sixteen = gaps
    results = re.sub(r"\s+", " ", _section("Source code"))
    assert f"the gaps are {two} at 2×, {four} at 4×, {eight} at 8× and {sixteen} at 16×" in results
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert (
        f"the defaults' gaps are {four}, {eight} and {sixteen}, and the gap at 2× is {two}"
        in readme
    )
    limits = re.sub(r"\s+", " ", (DOCS / "limits.md").read_text())
    assert f"the gaps are {four} at 4× and {eight} at 8×" in limits
