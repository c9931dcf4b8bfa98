# SPDX-License-Identifier: Apache-2.0
"""report.py: synthetic run reports in, table and picture out."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import report
import report_pictures
import report_runs
from mapl.files import METRICS_FILE, TRAFFIC_FILE
from report_runs import Run, Traffic


def entry(header: int, ids: int, latents: int, projector: int, payloads: int) -> dict[str, int]:
    return dict(header=header, ids=ids, latents=latents, projector=projector, payloads=payloads)


def write_report(
    directory: Path, *, boundaries: int = 2, losses: list[float] | None = None
) -> Path:
    """A report of 10 payloads forward and 6 backward at each boundary, 1000 bytes uncompressed."""
    directory.mkdir()
    one = {
        "forward": entry(10, 20, 100, 0, 10),
        "backward": entry(6, 0, 60, 0, 6),
        "projector": entry(2, 0, 0, 40, 2),
        "forward_codebook": {"codebook": 8, "header": 2, "unsplit": 99, "payloads": 1},
        "uncompressed": 16_000,
        "sent": 238,
    }
    traffic: dict[str, Any] = {
        "boundaries": [{"boundary": b, **one} for b in range(boundaries)],
        "seconds": {"after_first_step": 12.0, "communication": {"mean": 3.0, "max": 4.0}},
    }
    (directory / TRAFFIC_FILE).write_text(json.dumps(traffic))
    if losses is not None:
        lines = [json.dumps({"iteration": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
        (directory / METRICS_FILE).write_text("\n".join(lines) + "\n")
    return directory


def test_load_adds_up_all_kinds_over_all_boundaries(tmp_path: Path) -> None:
    run = report_runs.load(write_report(tmp_path / "mapl", losses=[5.0, 4.0])).run
    assert run.name == "mapl"
    assert run.losses == [(1, 5.0), (2, 4.0)]
    assert run.traffic == Traffic(forward=280, backward=132, projector=84)
    assert run.uncompressed == Traffic(forward=20_000, backward=12_000)
    assert run.ratio == 32_000 / 496
    assert (run.seconds, run.communicating) == (12.0, 3.0)


def test_load_takes_a_run_that_is_writing_its_last_line(tmp_path: Path) -> None:
    directory = write_report(tmp_path / "mapl", losses=[5.0])
    with (directory / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 2, "lo')
    assert report_runs.load(directory).run.losses == [(1, 5.0)]


def test_load_does_without_metrics(tmp_path: Path) -> None:
    run = report_runs.load(write_report(tmp_path / "mapl")).run
    assert run.losses == []
    assert "mapl" in report_runs.table([run])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{}", "no run report"), ("not json", "no run report")],
)
def test_a_missing_or_damaged_report_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / TRAFFIC_FILE).write_text(text)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def some_run(name: str = "MAPL") -> Run:
    return Run(
        name=name,
        losses=[(step, 8.0 - step / 10) for step in range(1, 21)],
        validation=[(10, 7.1), (20, 6.25)],
        traffic=Traffic(4_000_000, 3_000_000, 1_000_000),
        uncompressed=Traffic(40_000_000, 24_000_000),
        seconds=61.4,
    )


def test_table_shows_every_byte_and_lines_up() -> None:
    text = report_runs.table([some_run(), some_run("another name")])
    header, _, first, _ = text.splitlines()
    assert len(set(map(len, text.splitlines()))) == 1
    columns = {"training loss": "7.900 → 6.200", "validation loss": "6.2500", "forward MB": "4.0",
               "backward MB": "3.0", "projector MB": "1.0", "total MB": "8.0", "ratio": "8.00×",
               "training s": "61", "communicating s": "–"}  # fmt: skip
    for name, value in columns.items():
        end = header.index(name) + len(name)
        assert first[:end].endswith(value), name


def test_markdown_table_has_equal_columns() -> None:
    lines = report_runs.table([some_run()], markdown=True).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def test_smoothed_is_a_trailing_mean() -> None:
    assert report_runs.smoothed([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]
    assert report_runs.smoothed([]) == []


def test_draw_writes_a_whole_png(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "picture.png"
    plain = some_run("uncompressed")
    report_pictures.draw([plain, some_run()], path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1200 and height > 500
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_command_line_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_report(tmp_path / "r32", losses=[5.0, 4.0, 3.0])
    second = write_report(tmp_path / "r16", boundaries=1, losses=[5.0, 4.5, 4.0])
    out = tmp_path / "out.png"
    assert report.main([str(first), str(second), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "r32" in printed and "r16" in printed and str(out) in printed
    assert out.stat().st_size > 10_000


def test_command_line_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_report(tmp_path / "plain", losses=[5.0, 4.0, 3.0])
    second = write_report(tmp_path / "mine", boundaries=1, losses=[5.0, 4.5, 4.0])
    out = tmp_path / "report.html"
    assert report.main([str(first), str(second), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "plain" in printed and f"written in {out}" in printed
    assert out.read_text().startswith("<!doctype html>")


def test_flags_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--out", "report.html"])
    error = capsys.readouterr().err
    assert error == "report.py: error: unrecognized arguments: --out report.html\n"


def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_report(tmp_path / "run", losses=[5.0])
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "report.html"
    assert report.main([str(run), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report.py: error: {tmp_path / 'file'}") and error.count("\n") == 1
    assert "check the path" in error


def test_ctrl_c_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "load_all", interrupt)
    assert report.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("report.py: interrupted; ")
