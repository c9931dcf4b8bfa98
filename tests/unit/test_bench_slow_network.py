# SPDX-License-Identifier: Apache-2.0
"""bench_slow_network.py: plan, log, figures, refusals; and its network where one can be built."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import bench_slow_network
import slow_network_cleanup as cleanup
import slow_network_plan as plan
from mapl.config import MaplConfig
from shaped_hosts import NetworkError, ShapedHosts, check_machine
from slow_network_figures import draw
from slow_network_goodput import goodput
from slow_network_job import Course, JobError, Place, Training
from slow_network_results import Results, Timing, Traffic, agreement, hiding, wire_share
from slow_network_tables import page
from training_log import Step, parse_step

LINE = (
    " [2026-01-01 00:00:00.0] iteration        7/    5000 | consumed samples:          168 | "
    "elapsed time per iteration (ms): 1234.5 | learning rate: 1.500000E-03 | global batch size:"
    "    24 | lm loss: 6.154321E+00 | loss scale: 1.0 | grad norm: 1.7 |"
)
SIZES = plan.Sizes()
EFFORT = plan.Effort()
SETTINGS = {setting.name: setting for setting in plan.settings(SIZES.hidden)}


def test_a_step_is_read_from_megatrons_log() -> None:
    assert parse_step(LINE) == Step(number=7, seconds=1.2345, loss=6.154321)
    assert parse_step("[after training is done] datetime: 2026-01-01") is None


def test_a_loss_that_is_no_number_is_a_step_too() -> None:
    step = parse_step(LINE.replace("6.154321E+00", "nan"))
    assert step is not None
    assert math.isnan(step.loss)


def take(course: Course, seconds: float) -> bool:
    return course.take(Step(len(course.all_steps) + 1, seconds, 5.0))


def test_a_course_discards_and_then_counts() -> None:
    course = Course([plan.Phase(20, 2, 2), plan.Phase(None, 1, 1)])
    assert [take(course, s) for s in (9, 8)] == [False, False]
    assert course.about_to_time
    assert [take(course, s) for s in (1, 2)] == [False, True]
    assert course.next_phase()
    assert course.phase.mbit is None
    assert [take(course, s) for s in (7, 3)] == [False, True]
    assert not course.next_phase()
    assert [[step.seconds for step in steps] for steps in course.steps] == [[1, 2], [3]]
    assert len(course.all_steps) == 6


def test_a_phase_lasts_for_its_seconds() -> None:
    course = Course([plan.Phase(20, 1, 2, seconds=10)])
    assert [take(course, s) for s in (50, 4, 4, 4)] == [False, False, False, True]


@pytest.mark.parametrize("effort", [EFFORT, plan.QUICK])
def test_every_job_has_its_bandwidths_and_an_unlimited_link(effort: plan.Effort) -> None:
    for setting in SETTINGS.values():
        phases = plan.phases(SIZES, setting, effort, 60.0)
        bandwidths = {effort.lowest} if setting.few else set(effort.bandwidths)
        assert {phase.mbit for phase in phases} == {None, *bandwidths}
        assert len(phases) == len(bandwidths) + 1
        assert [phase.discard for phase in phases] == [2] + [1] * len(bandwidths)
        assert all(phase.steps >= effort.least for phase in phases)
        if setting.curve:
            assert (phases[0].mbit, phases[0].seconds) == (effort.curve_mbit, 60.0)


def test_the_uncompressed_curve_sets_the_time_of_the_others() -> None:
    first = plan.phases(SIZES, SETTINGS[plan.UNCOMPRESSED], EFFORT, None)[0]
    assert (first.steps, first.seconds) == (EFFORT.curve_steps, 0.0)


def test_the_whole_bench_takes_minutes() -> None:
    for effort, minutes in ((EFFORT, 20), (plan.QUICK, 8)):
        jobs = [
            plan.expected_seconds(SIZES, s, plan.phases(SIZES, s, effort, effort.curve_steps * 6))
            for s in SETTINGS.values()
            if s.quick or effort is EFFORT
        ]
        assert sum(jobs) < minutes * 60


def test_settings_are_consistent() -> None:
    fields = {field.name for field in dataclasses.fields(MaplConfig)}
    assert next(iter(SETTINGS)) == plan.UNCOMPRESSED
    assert not SETTINGS[plan.UNCOMPRESSED].flags
    assert len(SETTINGS) == len(plan.settings(SIZES.hidden))
    for setting in SETTINGS.values():
        assert setting.without_hiding is None or setting.without_hiding in SETTINGS
        flags = [word for word in setting.flags.split() if word.startswith("--")]
        unknown = {flag for flag in flags if flag[7:].replace("-", "_") not in fields}
        assert not unknown, f"{setting.name}: {unknown}"


def results() -> Results:
    """Uncompressed 10 s a step, two that send a quarter, 1 s of computation."""
    data = Results(SIZES, {"cores": "2"}, curve_mbit=20, goodput={20: 19.1})
    for name, slow, fast in (
        ("uncompressed", 10.0, 1.0),
        ("MAPL d/4", 2.5, 1.0),
        ("MAPL d/4, none ahead", 5.0, 1.0),
    ):
        data.timings.append(Timing(name, 20, "shaped", [slow + 1, slow, slow - 0.5], 2e7, 0.0))
        data.timings.append(Timing(name, None, "shaped", [fast]))
        data.traffic[name] = Traffic(4e6, 16e6, 1e6)
        data.curves[name] = [(0.0, 7.0), (slow, 6.0), (2 * slow, 5.5)]
    data.traffic["uncompressed"] = Traffic(16e6, 16e6, 4e6)
    data.timings.append(Timing("MAPL d/4", 20, "emulated", [2.6]))
    return data


def test_what_follows_from_the_measurements() -> None:
    data = results()
    row = data.rows(20)[1]
    assert (row.setting, row.step, row.fastest, row.slowest) == ("MAPL d/4", 2.5, 2.0, 3.5)
    assert row.tokens_per_second == SIZES.step_tokens / 2.5
    assert (row.ratio, row.speed_up, row.of_ratio) == (4.0, 4.0, 1.0)
    assert row.compute_share == 0.4
    assert row.floor == pytest.approx(1e6 * 8 / 20e6)
    assert not row.compute_bound
    assert wire_share(data, 20) == pytest.approx(0.9)
    assert hiding(data)[0] == ("MAPL d/4", 20, 5.0, 2.5)
    assert agreement(data) == [("MAPL d/4", 20, 2.5, 2.6)]


def test_a_row_without_a_base_has_no_speed_up() -> None:
    data = results()
    data.timings = [timing for timing in data.timings if timing.setting != "uncompressed"]
    assert data.rows(20)[0].speed_up is None
    assert wire_share(data, 20) is None
    assert "No uncompressed run" in page(data, markdown=False)


def test_results_survive_json() -> None:
    data = results()
    data.failed["MAPL d/8"] = "no flag of that name"
    data.other_programs["MAPL d/4"] = 0.3
    again = Results.from_json(data.to_json())
    assert again == data


@pytest.mark.parametrize("markdown", [False, True])
def test_the_page_names_what_meets_and_what_misses_the_goal(markdown: bool) -> None:
    data = results()
    data.failed["MAPL d/8"] = "no flag of that name"
    data.other_programs |= {"MAPL d/4": 0.3, "uncompressed": 0.02}
    text = page(data, markdown=markdown)
    assert "spends 90% of its step on the wire" in text
    assert "meets: MAPL d/4; misses: MAPL d/4, none ahead" in text
    assert "+100%" in text  # hiding
    assert "+4.0%" in text  # agreement
    assert "longer than it need: MAPL d/4 (30%)." in text
    assert "MAPL d/8 failed: no flag of that name" in text
    assert ("| setting" in text) == markdown


def test_the_goal_needs_a_slow_network() -> None:
    data = results()
    data.timings[1] = Timing("uncompressed", None, "shaped", [4.0])
    assert "does not apply" in page(data, markdown=False)


def test_redraw_writes_page_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(results().to_json())
    arguments = ["--redraw", str(file), "--output-dir", str(tmp_path / "out")]
    assert bench_slow_network.main(arguments) == 0
    assert "MAPL d/4" in capsys.readouterr().out
    assert (tmp_path / "out/slow_network.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/slow_network.md").read_text().startswith("# ")


def test_a_picture_of_one_setting_at_one_bandwidth(tmp_path: Path) -> None:
    data = results()
    data.timings, data.curves = data.timings[:2], {}
    draw(data, tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the bench refuses, before anything else."""
    assert bench_slow_network.main([*arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_it_says_that_it_needs_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in refusal(capsys)


def test_it_says_which_program_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs ip; install iproute2" in refusal(capsys)


def test_it_says_that_the_token_bucket_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, script in (("ip", "exit 0"), ("tc", "echo Unknown qdisc tbf >&2; exit 2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refusal(capsys)
    assert "tbf" in line
    assert "Unknown qdisc" in line


def test_it_names_a_setting_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_slow_network, "check_machine", lambda: None)
    line = refusal(capsys, "--settings", "MAPL d/3")
    assert "'MAPL d/3'" in line
    assert "'MAPL d/4'" in line


@pytest.mark.parametrize(
    "option", ["--stages 1", "--bandwidths 0", "--bandwidths 5 -5", "--hidden-size 100"]
)
def test_it_names_an_option_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(bench_slow_network, "check_machine", lambda: None)
    assert option.split()[0] in refusal(capsys, *option.split())


def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(stage: int, command: object) -> list[str]:
        return [sys.executable, "-c", "print('a start'); raise ValueError('a reason')"]

    place = Place(enter, "127.0.0.1", "lo")
    with Training([], 2, place, tmp_path / "job.log") as training:
        with pytest.raises(JobError, match="a reason") as failure:
            for line in training.lines():
                assert parse_step(line) is None
    assert "exit code 1" in failure.value.brief
    assert "ValueError: a reason" in failure.value.brief


@pytest.fixture
def network() -> None:
    """Skips where the machine cannot build one."""
    try:
        check_machine()
    except NetworkError as error:
        pytest.skip(str(error))


def namespaces(prefix: str) -> list[str]:
    listing = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listing.splitlines() if line.startswith(prefix)]


def gone(prefix: str, pids: list[int]) -> bool:
    """Whether namespaces and processes disappear within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not namespaces(prefix) and not any(map(psutil.pid_exists, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.usefixtures("network")
def test_links_are_shaped_and_nothing_is_left() -> None:
    with ShapedHosts(3, 20) as hosts:
        assert len(namespaces(cleanup.own_prefix())) == 4
        before = hosts.bytes_sent()
        # Generous at the lower end: this machine may be busy.
        assert 4 < goodput(hosts, 0, 1, 1_000_000) < 20.5
        assert 4 < goodput(hosts, 2, 1, 1_000_000) < 20.5
        after = hosts.bytes_sent()
        assert after[0, "next"] - before[0, "next"] > 100_000
        assert after[0, hosts.device] - before[0, hosts.device] < 10_000
        assert goodput(hosts, 0, 2, 20_000_000) > 40  # no neighbours
        with ThreadPoolExecutor(1) as thread:
            for _ in range(6):  # what waits when the bandwidth falls must not block the link
                hosts.shape(500)
                under_way = thread.submit(goodput, hosts, 0, 1, 1_500_000)
                time.sleep(0.03)
                hosts.shape(20)
                assert under_way.result(60) > 1
        hosts.shape(None)
        assert goodput(hosts, 0, 1, 20_000_000) > 40
        child = subprocess.Popen(hosts.run_on(1, ["sleep", "100"]))
        assert cleanup.own_prefix() + "host1" not in cleanup.leftovers()
    assert child.wait(10) == -signal.SIGKILL
    assert not namespaces(cleanup.own_prefix())


OWNER = """
import subprocess, sys, time
from shaped_hosts import ShapedHosts
with ShapedHosts(2, 20) as hosts:
    children = [subprocess.Popen(hosts.run_on(h, ["sleep", "100"])) for h in (0, 1, None)]
    time.sleep(0.2)
    print(hosts.names[0], *(child.pid for child in children), flush=True)
    time.sleep(100)
"""


@pytest.mark.usefixtures("network")
def test_nothing_is_left_when_the_owner_is_killed() -> None:
    tools = Path(bench_slow_network.__file__).parent
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=tools, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    name, *pids = owner.stdout.readline().split()
    prefix = name.removesuffix("host0")
    assert len(namespaces(prefix)) == 3
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(prefix, list(map(int, pids)))


@pytest.mark.usefixtures("network")
def test_leftovers_are_those_of_owners_that_are_gone() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    # A process of that number may run again, but has started later.
    left = [f"slow-network-{dead.pid}-1-host0", f"slow-network-{os.getpid()}-1-host0"]
    mine = f"{cleanup.own_prefix()}host0"
    try:
        for name in (*left, mine):
            subprocess.run(["ip", "netns", "add", name], check=True)
        assert set(left) <= set(cleanup.leftovers())
        assert mine not in cleanup.leftovers()
    finally:
        cleanup.remove([*left, mine])
    assert not {*left, mine} & set(namespaces("slow-network-"))
