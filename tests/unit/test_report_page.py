# SPDX-License-Identifier: Apache-2.0
"""report.py's page: what it has of which runs. How it looks is tests/distributed's matter."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import report
import report_runs
from mapl.files import METRICS_FILE, TRAFFIC_FILE
from report_series import read_series
from report_text import figure, unit_of
from test_report import write_report
from test_report_geometry import write_measured

LOG = (
    "[before the start of training step] datetime: 2026\n"
    " [2026] iteration 1/ 2 | elapsed time per iteration (ms): 500.0 | lm loss: 5.0E+00 |\n"
    " [2026] iteration 1/ 2 | boundary traffic (MB): 0.1 | traffic ratio: 8.00 |\n"
    " [2026] iteration 2/ 2 | elapsed time per iteration (ms): 400.0 | lm loss: 4.0E+00 |\n"
    " validation loss at iteration 2 on validation set | lm loss value: 4.500000E+00 | PPL\n"
    " validation loss at iteration 2 on test set | lm loss value: 9.000000E+00 | PPL\n"
)  # fmt: skip


def page(tmp_path: Path, *runs: Path) -> str:
    output = tmp_path / "out" / "page.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    return output.read_text()


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*)</h2>", text)


def without(text: str) -> list[str]:
    return re.findall(r"Without such data: (.*)\.", text)


def log_file(path: Path, text: str = LOG) -> Path:
    path.write_text(text)
    return path


def test_only_sections_with_data_and_what_the_others_take(tmp_path: Path) -> None:
    text = page(tmp_path, log_file(tmp_path / "plain.log"))
    assert headings(text) == ["Losses", "Left out"]
    assert "Codebook use, which takes the codec rvq" in text and not without(text)
    assert "4.5000" in text and "9.0000" not in text  # validation, not test
    pictures = (tmp_path / "out" / "page-figures").iterdir()
    assert [picture.name for picture in pictures] == ["losses.png"]


def test_a_section_names_the_runs_without_its_data(tmp_path: Path) -> None:
    measured = write_measured(tmp_path / "learned")
    counted = write_report(tmp_path / "counted", losses=[5.0, 4.0])
    text = page(tmp_path, measured, log_file(tmp_path / "plain.log"), counted)
    assert headings(text)[:4] == ["Losses", "Traffic", "Time on the wire", "Geometry"]
    assert without(text) == ["plain.log", "plain.log", "plain.log, counted"]


def test_a_run_that_has_not_saved_yet(tmp_path: Path) -> None:
    run = write_report(tmp_path / "run", losses=[5.0, 4.0])
    (run / TRAFFIC_FILE).unlink()
    assert headings(page(tmp_path, run)) == ["Losses", "Left out"]


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    text = page(tmp_path, write_report(tmp_path / "diverged", losses=[5.0, float("nan")]))
    assert re.findall(r"<td>(.*)</td>", text)[:3] == ["2", "5.0000", "nan"]


def test_nothing_comes_from_outside_the_page(tmp_path: Path) -> None:
    text = page(tmp_path, write_measured(tmp_path / "learned"))
    for attribute in re.findall(r'(?:src|href)="([^"]*)', text):
        assert attribute.startswith(("data:", "#"))
    assert "<script" not in text and "url(" not in text and "@import" not in text


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [
        write_report(tmp_path / "a" / "report", losses=[5.0]),
        write_report(tmp_path / "b" / "report", losses=[4.0]),
    ]
    assert [own.run.name for own in report_runs.load_all(paths)] == ["a/report", "b/report"]
    assert [own.run.name for own in report_runs.load_all(paths[:1])] == ["report"]


@pytest.mark.parametrize("case", ["twice", "no log", "damaged", "no JSON", "absent", "no bytes"])
def test_bad_input_is_one_line_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    run = write_report(tmp_path / "run", losses=[5.0])
    runs = [run]
    if case == "twice":
        runs, message = [run, tmp_path / "run" / ".." / "run"], "is given twice; give each run once"
    elif case == "no log":
        runs, message = [log_file(tmp_path / "x", "text")], "no line of Megatron's log with a loss"
    elif case == "damaged":
        line = {"iteration": 1, "loss": 5.0, "boundaries": [{"energy_kept": 0.5}]}
        with (run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        message = f"{run / METRICS_FILE}, line 2, is no line of metrics (KeyError"
    elif case == "no JSON":
        whole = (run / METRICS_FILE).read_text()
        (run / METRICS_FILE).write_text(f"{whole}x{whole}{whole}")
        message = f"{run / METRICS_FILE}, line 2, is no line of metrics (JSONDecodeError"
    elif case == "absent":
        runs, message = [tmp_path / "nowhere"], "does not exist, nor events of TensorBoard"
    else:
        nothing: dict[str, Any] = {"boundaries": [], "seconds": {}}
        (run / TRAFFIC_FILE).write_text(json.dumps(nothing))
        message = f"{run / TRAFFIC_FILE} is no run report (ValueError('no byte crossed a boundary"
    out = tmp_path / "out"
    assert report.main([*map(str, runs), "--output", str(out / "page.html")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_other_kinds_of_output_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--output", "report.pdf"])
    assert "--output report.pdf is neither a page nor a picture" in capsys.readouterr().err


def test_a_run_without_a_save_counts_as_missing_where_bytes_are_needed(tmp_path: Path) -> None:
    run = write_report(tmp_path / "run", losses=[5.0])
    assert report_runs.load_counted(run).ratio > 1
    (run / TRAFFIC_FILE).unlink()
    with pytest.raises(report_runs.ReportError, match=r"mapl_traffic\.json does not exist"):
        report_runs.load_counted(run)


def test_losses_of_runs_of_unequal_length_are_compared_at_a_step_of_all(tmp_path: Path) -> None:
    long = write_report(tmp_path / "long", losses=[6.0, 5.0, 4.0, 3.0])
    short = write_report(tmp_path / "short", losses=[6.0, 5.5])
    text = page(tmp_path, long, short)
    assert "loss at step 2" in text
    rows = re.findall(r"<th[^>]*>(long|short)</th>\s*((?:<td>.*</td>\s*)+)", text)
    cells = {name: re.findall(r"<td>(.*)</td>", row) for name, row in reversed(rows)}
    assert cells["long"][:4] == ["4", "6.0000", "4.5000", "5.5000"]
    assert cells["short"][:4] == ["2", "6.0000", "5.7500", "5.7500"]


def test_series_leave_out_what_was_not_measured() -> None:
    lines = [
        {"iteration": 1, "boundaries": [{"boundary": 0, "energy_kept": None}], "angles": []},
        {"iteration": 2, "boundaries": [{"boundary": b, "energy_kept": 0.5} for b in (0, 1)]},
    ]
    for line in lines:
        for entry in line["boundaries"]:  # type: ignore[attr-defined]
            entry |= {"orthonormality_error": 1e-7, "skipped_steps": 0}
    series = read_series(lines)
    assert set(series) == {"energy", "orthonormality", "skipped"}
    assert series["energy"].steps == [2] and series["energy"].curves == {0: [0.5], 1: [0.5]}
    assert series["orthonormality"].steps == [1, 2]


def test_the_share_in_communication_is_between_lines_of_one_run() -> None:
    def line(step: int, elapsed: float, communicating: float) -> dict[str, Any]:
        communication = {"mean": communicating, "max": communicating}
        seconds = {"after_first_step": elapsed, "communication": communication}
        return {"iteration": step, "seconds": seconds}

    # Resumed after the third.
    lines = [line(1, 0, 0), line(2, 10, 4), line(3, 20, 10), line(4, 2, 1), line(5, 4, 1.5)]
    share = read_series(lines)["communication"]
    assert share.steps == [2, 3, 5] and share.curves == {0: [0.4, 0.6, 0.25]}


@pytest.mark.parametrize(
    ("counts", "name", "text"),
    [
        ([], "B", "7"),
        ([999], "B", "7"),
        ([1000, 7], "kB", "0.01"),
        ([999_999_999], "MB", "<0.01"),
    ],
)
def test_bytes_are_told_in_the_unit_of_the_largest(counts: list[int], name: str, text: str) -> None:
    unit = unit_of(counts)
    assert unit.name == name and unit.text(7) == text and unit.text(0) == "0"


def test_a_figure_that_is_not_known_is_a_dash() -> None:
    assert [figure(v, ".1f") for v in (None, float("nan"), 0.25)] == ["–", "–", "0.2"]


def test_the_page_does_not_need_its_folder(tmp_path: Path) -> None:
    text = page(tmp_path, write_report(tmp_path / "run", losses=[5.0]))
    shutil.rmtree(tmp_path / "out" / "page-figures")
    assert text.count("data:image/png;base64,iVBOR") == text.count("<img ")
