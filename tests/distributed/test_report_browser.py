# SPDX-License-Identifier: Apache-2.0
"""The page of report.py about real runs, as a browser shows it."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import report
from cluster import Cluster
from layouts import LAYOUTS, PP2, VPP, Layout

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 400)
#: A name that would break a page which takes it for HTML, and a picture which takes it for TeX.
HOSTILE = "_int8 <img src=x onerror=alert(1)> & $x_"


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Plain Megatron's TensorBoard and log; all that can be measured; a run that is shorter."""
    folder = tmp_path_factory.mktemp("runs")
    board = f"--tensorboard-dir {folder}/plain"
    more = "--mapl-rank 16 --eval-interval 3"
    plain = cluster.run(
        2, LAYOUTS["pp2"].command(f"--train-iters 8 --eval-interval 3 {board}"), plain=True
    )
    cluster.run(
        2,
        Layout(2, f"{PP2} {VPP}").command(
            f"{more} --train-iters 8 --mapl-geometry-interval 2 --mapl-projector-lr-mult 3",
            "--mapl-forward-codec rvq --mapl-rvq-codes 16 --mapl-backward-codec int4",
            f"--mapl-report-dir {folder}/rvq --tensorboard-dir {folder}/rvq",
        ),
    )
    short = cluster.run(2, LAYOUTS["pp2"].command(f"{more} --mapl-forward-codec int8"))
    shutil.copytree(short.folder / "mapl-report", folder / HOSTILE)
    shutil.copy(plain.folder / "log.1", folder / "megatron.log")
    return [folder / "plain", folder / "rvq", folder / HOSTILE,
            folder / "megatron.log"]  # fmt: skip


@pytest.fixture(scope="module")
def page_file(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser without a window. In CI it must be there: `.ci/run` installs it."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None and "CI" not in os.environ:
        pytest.skip("no browser; on Debian: apt-get install chromium-headless-shell")
    assert program, "CI has no browser; .ci/run is to install one"
    with sync_playwright() as playwright:
        # As root, which CI is, Chromium's sandbox does not start; the page is our own.
        running = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield running
        running.close()


class Shown:
    """The page in the browser, and what it said and asked for while it loaded."""

    def __init__(self, browser: Any, file: Path, width: int, **settings: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, **settings)
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(file.as_uri())

    def cells(self, caption: str) -> list[list[str]]:
        """The text of a table, row by row, its head first."""
        table = self.tab.locator("table", has=self.tab.locator(f"caption:text-is('{caption}')"))
        rows: list[list[str]] = table.evaluate(
            "table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return rows


@pytest.mark.parametrize("width", WIDTHS)
def test_it_loads_by_itself_and_is_seen(
    browser: Any, page_file: Path, tmp_path: Path, width: int
) -> None:
    alone = tmp_path / "moved.html"  # without the folder of pictures
    shutil.copy(page_file, alone)
    shown = Shown(browser, alone, width)
    assert shown.said == []
    assert [url for url in shown.requests if not url.startswith("data:")] == [alone.as_uri()]
    headings = shown.tab.locator("h1, h2").all_inner_texts()
    assert headings == [
        "Run report", "Losses", "Traffic", "Time on the wire", "Energy kept", "Orthogonality",
        "Angles between neighbours", "Codebook use", "Geometry",
    ]  # fmt: skip
    images = shown.tab.locator("img").evaluate_all(
        "all => all.map(i => [i.naturalWidth, i.clientWidth, i.alt, i.complete])"
    )
    assert len(images) == 15
    for natural, seen, alt, complete in images:
        assert complete and natural > 800 and 300 < seen <= width and len(alt) > 20
    # Nothing but what scrolls by itself is wider than the window.
    assert shown.tab.evaluate("document.documentElement.scrollWidth") == width
    colours = colours_of(shown.tab.screenshot(full_page=True))
    assert len(colours) > 100
    assert "#0072b2" in colours and "#cc79a7" in colours  # two of the runs' lines


def colours_of(screenshot: bytes) -> set[str]:
    """Of a PNG, those that at least 50 of its pixels have."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    counted = image.getcolors(image.width * image.height) or []
    return {"#{:02x}{:02x}{:02x}".format(*colour) for count, colour in counted if count >= 50}


def test_tables_have_the_runs_figures(browser: Any, page_file: Path, runs: list[Path]) -> None:
    shown = Shown(browser, page_file, 1280)
    _, rvq, short, log = runs
    traffic = {
        run.name: json.loads((run / "mapl_traffic.json").read_text()) for run in (rvq, short)
    }
    head, *rows = shown.cells("Traffic by kind, kB")
    assert [row[0] for row in rows] == [rvq.name, short.name]
    for row in rows:
        total = traffic[row[0]]["total"]
        said = dict(zip(head, row, strict=True))
        assert said["ratio"] == f"{total['ratio']:.2f}×"
        assert said["total"] == f"{total['sent'] / 1e3:,.2f}"
        assert said["uncompressed MB"] == f"{total['uncompressed'] / 1e6:,.2f}"
        for kind in ("header", "ids", "latents", "scales", "codebook", "projector"):
            assert said[kind] == (f"{total[kind] / 1e3:,.2f}" if total[kind] else "0")
    by_boundary = shown.cells("Traffic by boundary, kB")[1:]
    assert [row[:2] for row in by_boundary] == [[rvq.name, str(b)] for b in range(3)] + [
        [short.name, "0"]
    ]
    assert [row[5] for row in by_boundary] == [
        f"{entry['sent'] / 1e3:,.2f}"
        for report in traffic.values()
        for entry in report["boundaries"]
    ]
    lines = [json.loads(line) for line in (rvq / "mapl_metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    losses = {row[0]: row for row in shown.cells("Losses of each run")[1:]}
    assert losses[rvq.name][1:4] == [
        "8", f"{lines[0]['loss']:.4f}", f"{sum(line['loss'] for line in lines[-5:]) / 5:.4f}"
    ]  # fmt: skip
    assert losses[short.name][1] == "4" and losses[short.name][-2:] == ["–", "–"]
    # TensorBoard and the log of the same run, whose test loss is not taken for the validation's.
    assert losses["plain"][1:] == losses[log.name][1:] and losses["plain"][-1] == "8"
    (said,) = (row for row in shown.cells("Time of each run") if row[0] == rvq.name)
    seconds = traffic[rvq.name]["seconds"]
    assert said[1:4] == [
        f"{seconds['after_first_step']:,.1f}",
        f"{seconds['communication']['mean']:,.1f}",
        f"{seconds['communication']['max']:,.1f}",
    ]
    for caption, expected in {
        "Energy kept": [f"{e['energy_kept']:.3f}" for e in last["boundaries"]],
        "Orthogonality": [f"{e['orthonormality_error']:.1e}" for e in last["boundaries"]],
        "Angles between neighbours": [f"{e['mean_degrees']:.2f}" for e in last["angles"]],
        "Codebook use": [f"{e['perplexity']:.1f}" for e in last["codebooks"]],
    }.items():
        rows = shown.cells(f"{caption} at the last step")
        assert [row[3] for row in rows if row[0] == rvq.name] == expected
    rows = shown.cells("Geometry at the last step measured")[1:]
    assert [row[3] for row in rows] == [
        f"{entry['energy_kept']:.3f}" for entry in last["geometry"]["boundaries"]
    ]


def test_sections_say_which_runs_have_no_such_data(browser: Any, page_file: Path) -> None:
    """Names are text, whatever they look like, and the page does without JavaScript."""
    shown = Shown(browser, page_file, 1280, java_script_enabled=False)
    said = {
        key: shown.tab.locator(f"#{key} .without").all_inner_texts()
        for key in ("losses", "traffic", "angles", "codebooks", "geometry")
    }
    none = "Without such data: plain,"
    assert said == {
        "losses": [],
        "traffic": [f"{none} megatron.log."],
        **{k: [f"{none} {HOSTILE}, megatron.log."] for k in ("angles", "codebooks", "geometry")},
    }


def test_the_pictures_also_stand_beside_the_page(page_file: Path) -> None:
    text = page_file.read_text()
    pictures = sorted(page_file.with_name("report-figures").iterdir())
    assert len(pictures) == text.count("<img ") == 15
    assert all(f'id="picture-{picture.stem}"' in text for picture in pictures)
    assert sorted(file.name for file in page_file.parent.iterdir()) == [
        "report-figures", "report.html",
    ]  # fmt: skip
