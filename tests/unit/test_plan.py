# SPDX-License-Identifier: Apache-2.0
"""plan.py: what it writes, and what it refuses."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import plan
import plan_settings
from mapl.plan import plan_boundaries
from plan_settings import Setting
from tests.unit.plan_cases import DOCS, JOB, ROOT

FLAGS = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 8 --seq-length 1024 --swiglu "
    "--vocab-size 32000 --micro-batch-size 1 --global-batch-size 16 "
    "--pipeline-model-parallel-size 4 --max-gap 1"
)
#: Two processes with virtual stages.
TWO = FLAGS + " --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
FAST = " --device-tflops 100"
SLOW = " --bandwidth 500 --latency 5"


def call(tmp_path: Path, flags: str) -> int:
    return plan.main([*flags.split(), "--output-dir", str(tmp_path / "out")])


def written(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "plan.json").read_text())
    return found


def test_text_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, FLAGS + SLOW + FAST) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "plan.txt").read_text() in text
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    data = written(tmp_path)
    by_name = {entry["setting"]: entry for entry in data["settings"]}
    assert set(by_name) >= {"uncompressed", "direct-int8", "mapl-8x", "paper-8x"}
    plain, best = by_name["uncompressed"], data["recommendation"]
    assert plain["step_seconds"] > by_name["direct-int8"]["step_seconds"] > best["step_seconds"]
    assert by_name["direct-int8"]["ratio"] == pytest.approx(1.94, abs=0.01)
    assert (plain["ratio"], plain["gap"]) == (1.0, 0.0)
    assert best["gap"] <= 1
    for entry in (*by_name.values(), best):
        assert sum(entry["seconds"].values()) == pytest.approx(entry["step_seconds"])
        tokens = JOB.step_tokens / entry["step_seconds"]
        assert entry["tokens_per_second"] == pytest.approx(tokens)
        floor = entry["seconds"]["computation"]
        assert entry["bubble"] == pytest.approx(entry["step_seconds"] / floor - 1)
    assert "bandwidth" in plain["bottleneck"]
    assert best["flags"] in text
    assert "100.7 M tokens, d = 768, 4 stages" in text


def test_direct_int8_is_predicted_where_it_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ROOT / "docs" / "results" / "search" / "results.json"
    assert call(tmp_path, FLAGS + SLOW + FAST + f" --gaps {search}") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Gaps are those of search/results.json: 39.3 M tokens" in text
    by_name = {entry["setting"]: entry for entry in written(tmp_path)["settings"]}
    assert by_name["direct int8"]["ratio"] == pytest.approx(1.94, abs=0.01)
    assert by_name["direct int8"]["gap"] is None and by_name["bigram-r248"]["gap"] is not None


def test_flags_to_paste_are_read_again(tmp_path: Path) -> None:
    call(tmp_path, FLAGS + " --bandwidth 1e6 500 1e6" + FAST)
    advice = written(tmp_path)["recommendation"]
    read = plan_settings.read(advice["flags"].split())
    config = Setting("", read).config
    assert config is not None
    assert [bool(rank) for rank in config.rank] == [False, True, False]
    settled = plan_boundaries(config, hidden_size=1024, boundaries=3)
    assert "--mapl-forward-codec int8 --mapl-backward-codec int4" in advice["flags"]
    assert [entry["rank"] for entry in advice["boundaries"]] == list(settled.ranks)
    assert [entry["forward_codec"] for entry in advice["boundaries"]] == [
        *("pipeline", settled.forward_codecs[1], "pipeline")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (FLAGS + FAST + " --bandwidth 5 6", "--bandwidth 5 6 gives 2 numbers for 3 links"),
        (FLAGS + FAST + " --bandwidth 0", "--bandwidth 0: Mbit/s must be positive"),
        (FLAGS + FAST + " --bandwidth nan", "--bandwidth nan: Mbit/s must be positive"),
        (FLAGS + FAST + " --bandwidth 5 --latency -1", "--latency -1: milliseconds must be"),
        (FLAGS + FAST + " --bandwidth inf", "--bandwidth inf: Mbit/s must be positive and finite"),
        (FLAGS + FAST + " --bandwidth 5 inf 5", "--bandwidth 5 inf 5: Mbit/s must be"),
        (FLAGS + FAST + " --bandwidth 5 nan 5", "--bandwidth 5 nan 5: Mbit/s must be"),
        (FLAGS + FAST + " --bandwidth 5 --latency inf", "--latency inf: milliseconds must be"),
        (FLAGS + FAST + " --bandwidth 5 --latency 1 nan 1", "--latency 1 nan 1: milliseconds"),
        (TWO + FAST + " --bandwidth 100 1000000", "gives 2 numbers for the one link of two"),
        (TWO + FAST + " --bandwidth 100 --latency 1 2", "--latency 1 2 gives 2 numbers for"),
        (FLAGS + SLOW + " --device-tflops inf", "--device-tflops inf must be positive and finite"),
        (FLAGS + SLOW + " --device-tflops nan", "--device-tflops nan must be positive and finite"),
        (FLAGS + SLOW + FAST + " --devices inf", "--devices inf must be positive and finite"),
        (FLAGS + SLOW + FAST + " --max-gap nan", "--max-gap nan must be finite"),
        (FLAGS + SLOW + FAST + " --max-gap inf", "--max-gap inf must be finite"),
        (FLAGS + FAST + " --links no.json", "--links no.json: No such file"),
        (FLAGS + FAST + " --links no.json --latency 1", "--latency 1.0 has no effect with --links"),
        (FLAGS + SLOW + " --measure --mfu 0.4", "--mfu 0.4 has no effect"),
        (FLAGS + SLOW + FAST + " --mfu 40", "--mfu 40 above 0 and at most 1"),
        (FLAGS + SLOW + FAST + " --devices 0", "--devices 0 must be positive"),
        (FLAGS + SLOW + FAST + " --num-layers 6", "--num-layers 6"),
        (FLAGS + SLOW + FAST + " --pipeline-model-parallel-size 1", "no link between stages"),
        (FLAGS + SLOW + FAST + " --global-batch-size 18 --micro-batch-size 4", "no multiple of"),
        (FLAGS + SLOW + FAST + " --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6",
         "change --global-batch-size 6"),
        (FLAGS + SLOW + FAST + " --seq-length -1", "--seq-length -1 must be at least 1"),
        (FLAGS + SLOW + " --step-log no.log", "--step-log no.log: No such file"),
        (FLAGS + SLOW + " --throughput-log no.log", "--throughput-log no.log: No such file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert call(tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan.py: error: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_docs_have_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(r"python tools/plan\.py (.*?)\n\n", DOCS, re.DOTALL)
    assert command is not None
    assert call(tmp_path, command[1].replace("\\\n", " ")) == 0
    text = capsys.readouterr().out.split("\nWritten: ")[0]
    assert textwrap.indent(text, "    ") in DOCS


def test_flags_are_not_abbreviated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(tmp_path, FLAGS + FAST + " --bandwidth 5 --lat 1")
    assert "unrecognized arguments: --lat 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budget", "links", "why"),
    [
        ("-3", " --bandwidth 5", "no measured setting loses at most -3% (the least is -1.26%)."),
        ("1", " --bandwidth 1e9", "no setting within the budget makes the step shorter by more"),
    ],
)
def test_why_plain_megatron_is_recommended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, links: str, why: str
) -> None:
    assert call(tmp_path, FLAGS + FAST + links + f" --max-gap {budget}") == 0
    assert f"plain Megatron, without --mapl-rank: {why}" in capsys.readouterr().out
    assert written(tmp_path)["recommendation"]["flags"] == ""


def test_two_processes_have_one_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, TWO + FAST + SLOW) == 0
    assert "\nLink of stages 0 and 1: 500 Mbit/s, 5 ms\n" in capsys.readouterr().out
    assert [(link["from"], link["to"]) for link in written(tmp_path)["links"]] == [(0, 1)]


def test_text_and_json_are_written_before_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError("no room left")

    monkeypatch.setattr(plan, "draw", no_room)
    assert call(tmp_path, FLAGS + SLOW + FAST) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.txt", "plan.json"}


def test_each_boundary_is_told_its_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, FLAGS + FAST + " --bandwidth 500 1000 5000 --latency 1 --max-gap 3") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "boundaries 0 to 1: rank 160, int8 forward, int4 back, as mapl-16x (+2.82%)" in text
    assert "boundary 2: rank 960, int8 forward, int8 back, as mapl-2x (-0.95%)" in text
    assert "Gap: at most +2.82%, as mapl-16x at all boundaries; step" in text
    advice = written(tmp_path)["recommendation"]
    assert [entry["measured_as"] for entry in advice["boundaries"]] == [
        "mapl-16x", "mapl-16x", "mapl-2x"
    ]  # fmt: skip
