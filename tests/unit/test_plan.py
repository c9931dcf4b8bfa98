# SPDX-License-Identifier: Apache-2.0
"""plan.py: what it predicts, what it recommends, and what it refuses."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import check_plan
import link_measurements
import plan
import plan_device
import plan_gaps
import plan_links
import plan_settings
import slow_network_plan as bench
import sweep_list
from link_measurements import Measured, Measurements
from mapl.plan import plan_boundaries
from pipeline_step import Direction, Link
from plan_job import Job
from plan_memory import added_bytes
from plan_prediction import Machine, link_count, predict, unlimited_seconds
from plan_recommendation import recommend
from plan_settings import Setting
from plan_traffic import boundaries
from slow_network_results import Results, Timing
from sweep_results import Row

ROOT = Path(__file__).parent.parent.parent

JOB = Job(
    num_layers=8, hidden_size=1024, num_attention_heads=8, seq_length=1024, vocab_size=32000,
    micro_batch_size=1, global_batch_size=16, pipeline_model_parallel_size=4, swiglu=True,
)  # fmt: skip
VIRTUAL = dataclasses.replace(JOB, num_virtual_stages_per_pipeline_rank=2)
GAPS = plan_gaps.read(plan.GAPS)

FLAGS = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 8 --seq-length 1024 --swiglu "
    "--vocab-size 32000 --micro-batch-size 1 --global-batch-size 16 "
    "--pipeline-model-parallel-size 4 --max-gap 1"
)
FAST = " --device-tflops 100"
SLOW = " --bandwidth 500 --latency 5"


def machine(*mbit: float, job: Job = JOB, flops: float = 1e14) -> Machine:
    """With links of these bandwidths, or of one for all."""
    links = plan_links.given(mbit, [1.0], link_count(job))
    return Machine(flops, tuple(links))


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
    assert set(by_name) >= {"uncompressed", "direct int8", "bigram-r248", "paper-8x"}
    plain, best = by_name["uncompressed"], data["recommendation"]
    assert plain["step_seconds"] > by_name["direct int8"]["step_seconds"] > best["step_seconds"]
    assert by_name["direct int8"]["ratio"] == pytest.approx(1.94, abs=0.01)
    assert (plain["ratio"], plain["gap"], by_name["direct int8"]["gap"]) == (1.0, 0.0, None)
    assert best["gap"] <= 1
    for entry in (*by_name.values(), best):
        assert sum(entry["seconds"].values()) == pytest.approx(entry["step_seconds"])
        tokens = JOB.step_tokens / entry["step_seconds"]
        assert entry["tokens_per_second"] == pytest.approx(tokens)
        floor = entry["seconds"]["computation"]
        assert entry["bubble"] == pytest.approx(entry["step_seconds"] / floor - 1)
    assert "bandwidth" in plain["bottleneck"]
    assert best["flags"] in text
    assert "39.3 M tokens, d = 768, 4 stages" in text


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


def test_memory_is_that_of_the_formula() -> None:
    """README's cluster job: 168 M parameters of tables on a GPU, 18 bytes each, and more."""
    job = dataclasses.replace(
        JOB, hidden_size=4096, vocab_size=32000, tensor_model_parallel_size=8,
        pipeline_model_parallel_size=8, sequence_parallel=True, seq_length=4096,
    )  # fmt: skip
    assert added_bytes(predict(job, Setting("", {}), machine(100, job=job))) == 0
    sizes = {}
    for anchor in ("bigram", "factorized", "none"):
        flags = {"rank": [1280], "anchor": anchor}
        sizes[anchor] = added_bytes(predict(job, Setting("", flags), machine(100, job=job)))
    tables = (32768 + 131072) * 1024
    assert 0 < sizes["bigram"] - sizes["factorized"] - 131072 * 1024 * 24 < 2**28
    assert sizes["bigram"] > tables * 18 > sizes["factorized"] > 32768 * 1024 * 18
    assert sizes["none"] < sizes["factorized"]


def test_what_holds_a_step_up_is_named() -> None:
    plain = Setting("uncompressed", {})
    slow = predict(JOB, plain, machine(1e6, 10, 1e6))
    assert slow.bottleneck.startswith("bandwidth from stage ")
    assert re.search(r"from stage (1 to 2|2 to 1), \d+% in use", slow.bottleneck)
    assert predict(JOB, plain, machine(10)).bottleneck.startswith("bandwidth of the links")
    # The last stage has the output layer too.
    assert predict(JOB, plain, machine(1e9)).bottleneck == "computation of stage 3"
    one = Machine(1e14, machine(1e9).links, devices=1)
    assert predict(JOB, plain, one).bottleneck == "computation"
    far = plan_links.given([1e9], [0.0, 500.0, 0.0], 3)
    assert predict(JOB, plain, Machine(1e14, tuple(far))).bottleneck == (
        "latency from stage 1 to 2"
    )
    everywhere = plan_links.given([1e9], [500.0], 3)
    assert predict(JOB, plain, Machine(1e14, tuple(everywhere))).bottleneck == (
        "latency of the links"
    )


def test_a_fast_network_leaves_the_bubble() -> None:
    """Equal stages: (P − 1) / m."""
    job = dataclasses.replace(
        JOB, vocab_size=1, make_vocab_size_divisible_by=1, pipeline_model_parallel_size=4
    )
    free = Direction(float("inf"), 0.0)
    prediction = predict(job, Setting("uncompressed", {}), Machine(1e12, (Link(free, free),) * 3))
    assert prediction.course.bubble == pytest.approx(3 / 16, rel=1e-3)
    floor = job.flops_a_token * job.step_tokens / 4 / 1e12
    assert prediction.seconds == pytest.approx(floor * (1 + 3 / 16), rel=1e-3)


def test_recomputation_adds_a_forward_pass_of_the_layers() -> None:
    job = dataclasses.replace(JOB, recompute_granularity="full")
    for chunk in range(4):
        forward, backward = JOB.chunk_flops(chunk)
        again = JOB.layers(chunk) * JOB.layer_flops * JOB.micro_batch_tokens / 3
        assert job.chunk_flops(chunk) == (forward, pytest.approx(backward + again))


def test_recommends_the_fastest_within_the_budget() -> None:
    settings = GAPS.carried_over(1024)
    slow = machine(100)
    seconds = []
    for budget in (1.0, 2.0, 3.0, 10.0):
        advice = recommend(JOB, slow, settings, budget)
        assert advice.measured is not None and advice.measured.gap is not None
        assert advice.measured.gap <= budget
        assert advice.plan is not None and min(advice.plan.ranks) > 0
        faster = [
            s.name for s in settings
            if s.gap is not None and s.gap <= budget
            and predict(JOB, s, slow).seconds < 0.98 * advice.prediction.seconds
        ]  # fmt: skip
        assert not faster
        seconds.append(advice.prediction.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


def test_nothing_is_compressed_where_the_network_costs_nothing() -> None:
    advice = recommend(JOB, machine(1e9), GAPS.carried_over(1024), 10.0)
    assert (advice.measured, advice.plan, advice.command_line) == (None, None, "")
    # The budget excludes all that was measured, those with a gain too.
    assert recommend(JOB, machine(10), GAPS.carried_over(1024), -5.0).measured is None


def test_boundaries_of_one_link_go_together() -> None:
    """Seven boundaries over four links: the first and the fifth share the slow one."""
    slow = machine(100, 1e7, 1e7, 1e7, job=VIRTUAL)
    advice = recommend(VIRTUAL, slow, GAPS.carried_over(1024), 1.0)
    assert advice.plan is not None
    ranks = advice.plan.ranks
    assert [bool(rank) for rank in ranks] == [
        *[True, False, False, False], *[True, False, False]
    ]  # fmt: skip
    assert ranks[0] == ranks[4]


def test_settings_keep_their_share_of_the_width() -> None:
    flags = plan_settings.read(
        "--mapl-rank 248 --mapl-anchor-rank 384 --mapl-log-interval 5".split()
    )
    assert plan_settings.carried_over(flags, 768, 768) == flags == {
        "rank": [248], "anchor_rank": 384
    }  # fmt: skip
    assert plan_settings.carried_over(flags, 768, 4096) == {"rank": [1328], "anchor_rank": 2048}
    codebooks = plan_settings.read("--mapl-rank 96 --mapl-rvq-groups 8".split())
    assert plan_settings.carried_over(codebooks, 768, 1024) == {"rank": [144], "rvq_groups": 12}
    whole = plan_settings.read("--mapl-rank 768 --mapl-projector none".split())
    assert plan_settings.carried_over(whole, 768, 1000)["rank"] == [1000]
    with pytest.raises(ValueError, match="a rank for each boundary"):
        plan_settings.carried_over({"rank": [8, 0, 8]}, 768, 1024)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mapl-rnak 8 --mapl-rank 8", "--mapl-rnak 8: this version has no such setting"),
        ("--mapl-rank eight", "--mapl-rank eight: this version has no such value"),
        ("--mapl-rank 8 --mapl-forward-codec int7", "--mapl-forward-codec int7: this version"),
        ("--mapl-rank 8 --mapl-topk 3 4", "--mapl-topk 3 4: it takes one value"),
    ],
)
def test_flags_that_there_are_not(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_settings.read(flags.split())


def test_measured_ratios_are_those_that_are_counted() -> None:
    """docs/search.md counts an evaluation too, which sends forward alone."""
    job = Job(
        num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024, vocab_size=32000,
        micro_batch_size=32, global_batch_size=64, pipeline_model_parallel_size=4,
    )  # fmt: skip
    rows = json.loads(plan.GAPS.read_text())
    ratios = {row["setting"]: row["ratio"] for row in rows}
    for setting in GAPS.carried_over(768):
        if ratios[setting.name] is not None:
            counted = predict(job, setting, machine(100)).ratio
            assert counted == pytest.approx(ratios[setting.name], rel=0.015), setting.name


def test_the_gaps_are_those_of_the_search() -> None:
    """Flags of tools/sweeps/search.toml, figures of docs/search.md."""
    listed = sweep_list.read(ROOT / "tools" / "sweeps" / "search.toml", None, to_run=False)
    flags = {run.setting: list(run.flags) for run in listed.runs}
    rows = {row["setting"]: row for row in json.loads(plan.GAPS.read_text())}
    assert rows and all(row["flags"] == flags[name] for name, row in rows.items())
    found = 0
    for line in (ROOT / "docs" / "search.md").read_text().splitlines():
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


def results(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    """A results.json with these rows, beside an uncompressed one."""
    path = tmp_path / "results.json"
    common = "--hidden-size 64 --mapl-virtual-stages 4"
    entries = []
    for changes in ({"setting": "plain", "uncompressed": True, "gap": 0.0}, *rows):
        own = {"setting": "s", "mapl": "--mapl-rank 8", "seed": 1, "uncompressed": False,
               "state": "finished", "tokens": 100, "loss": 2.0, "gap": 1.0,
               "seconds": 9.0, "tokens_per_second": 5.0, **changes}  # fmt: skip
        flags = f"{common} {own.pop('mapl')}".split()
        row = Row(label="", group="", flags=tuple(flags), **own)
        entries.append(row.to_json())
    path.write_text(json.dumps(entries))
    return path


def test_gaps_of_a_sweep(tmp_path: Path) -> None:
    path = results(
        tmp_path,
        {"setting": "two seeds", "gap": 1.0, "seed": 1},
        {"setting": "two seeds", "gap": 3.0, "seed": 2},
        {"setting": "short", "gap": 0.5, "tokens": 50},
        {"setting": "crashed", "gap": None, "loss": None},
        {"setting": "other ranks", "mapl": "--mapl-rank 8 0 8"},
    )
    gaps = plan_gaps.read(path)
    assert [(s.name, s.gap) for s in gaps.settings] == [("two seeds", 2.0)]
    assert (gaps.tokens, gaps.hidden_size, gaps.stages, gaps.shorter) == (100, 64, 4, 1)
    assert list(gaps.ignored) == ["other ranks"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; name a results.json"),
        ("{", "is not what tools/sweep.py writes"),
        ('[{"setting": "old"}]', "is not what tools/sweep.py writes .*make it anew"),
        ("[]", "no finished run with a gap"),
    ],
)
def test_files_without_gaps(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "gaps.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--gaps {path}.*{message}"):
        plan_gaps.read(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (FLAGS + FAST + " --bandwidth 5 6", "--bandwidth 5 6 gives 2 numbers for 3 links"),
        (FLAGS + FAST + " --bandwidth 0", "--bandwidth 0: Mbit/s must be positive"),
        (FLAGS + FAST + " --bandwidth nan", "--bandwidth nan: Mbit/s must be positive"),
        (FLAGS + FAST + " --bandwidth 5 --latency -1", "--latency -1: milliseconds must be"),
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


def test_measured_links(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    link = Measured(0, 1, 90.0, 80.0, 3.0, 0.01)
    back = Measured(1, 0, 50.0, 40.0, 4.0, 0.01)
    Measurements("gloo", ["a", "b"], [link, back]).write(path)
    (found,) = plan_links.measured(path, 2, 1)
    assert found == Link(Direction(80e6, 3e-3), Direction(40e6, 4e-3))
    with pytest.raises(ValueError, match="has 2 ranks and no measurement from 1 to 2"):
        plan_links.measured(path, 3, 2)
    path.write_text(path.read_text().replace("80.0", "0.0"))
    with pytest.raises(ValueError, match=r"rank 0 to 1 has 0\.0 Mbit/s"):
        link_measurements.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not what tools/measure_links\.py writes"):
        link_measurements.read(path)


def log_line(number: int, ms: float) -> str:
    return (
        f" iteration {number:8d}/ 100 | consumed samples: 16 | elapsed time per iteration (ms): "
        f"{ms} | throughput per GPU (TFLOP/s/GPU): {ms / 10} | lm loss: 5.0E+00 |\n"
    )


def test_the_speed_of_a_device_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(log_line(n, ms) for n, ms in [(1, 9000.0), (2, 1500.0), (3, 1000.0)]))
    assert plan_device.from_throughput(log) == pytest.approx(150e12)
    flops = plan_device.from_steps(log, JOB, None)
    # By the speed that follows, the job takes the median step where its network costs nothing.
    plain = Setting("uncompressed", {})
    seen = plan_device.TrainingLog.of(log.read_text().splitlines()).median_step
    assert unlimited_seconds(JOB, plain, None) / flops == pytest.approx(seen)
    log.write_text("nothing\n")
    with pytest.raises(ValueError, match="--log-throughput"):
        plan_device.from_throughput(log)
    with pytest.raises(ValueError, match="no line with 'elapsed time per iteration'"):
        plan_device.from_steps(log, JOB, None)


@pytest.mark.parametrize("swiglu", [True, False])
def test_the_speed_of_this_machine(monkeypatch: pytest.MonkeyPatch, swiglu: bool) -> None:
    monkeypatch.setattr(plan_device, "_SECONDS", 0.0)
    small = Job(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, seq_length=32,
        vocab_size=100, micro_batch_size=2, global_batch_size=2, swiglu=swiglu,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    assert 1e5 < plan_device.measure(small) < 1e16
    layer = plan_device._Layer(small)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    attention = 6 * small.hidden_size * small.seq_length
    assert 6 * weights + attention == small.layer_flops


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


def test_bytes_count_for_the_whole_step() -> None:
    setting = Setting("s", plan_settings.read("--mapl-rank 64".split()))
    prediction = predict(JOB, setting, machine(100))
    assert setting.config is not None and prediction.plan is not None
    each = boundaries(JOB, setting.config, prediction.plan)[0]
    once = each.step_onward + each.step_back
    assert once > 2 * 1024 * 64 * 4
    assert prediction.sent == 3 * (16 * (each.forward + each.backward) + once)


DOCS = (ROOT / "docs" / "planning.md").read_text()


def test_the_docs_have_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(r"python tools/plan\.py (.*?)\n\n", DOCS, re.DOTALL)
    assert command is not None
    assert call(tmp_path, command[1].replace("\\\n", " ")) == 0
    text = capsys.readouterr().out.split("\nWritten: ")[0]
    assert textwrap.indent(text, "    ") in DOCS


def test_the_docs_state_the_errors_of_the_bench() -> None:
    results = Results.from_json((ROOT / "docs" / "planning-bench.json").read_text())
    table, errors = check_plan.page(check_plan.check(results), markdown=True).split("\n\n")
    assert table in DOCS
    assert errors in DOCS.replace("\n", " ")
