# SPDX-License-Identifier: Apache-2.0
"""sweep.py: lists, runs that are stopped, crash and go on, tables and fronts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import sweep
import sweep_figures
import sweep_job
import sweep_list
from sweep_figures import gaps_while_training, within_reach
from sweep_job import Job, RunFolder
from sweep_list import SweepError, flag_value
from sweep_results import Row, front, means
from sweep_runner import devices, take_next
from sweep_tables import page
from sweep_traffic import TokenTraffic, token_traffic
from training_log import TrainingLog

TRAINER = Path(__file__).parent / "sweep_trainer.py"
TOOLS = Path(sweep.__file__).parent

HEAD = """
save_interval = 4
[training]
flags = "--train-iters 10 --global-batch-size 2 --seq-length 4"
[data]
flags = ""
"""
PLAIN = '[[run]]\nname = "plain"\n'
RANK = '[[run]]\nname = "r16"\nflags = "--mapl-rank 16"\n'


@pytest.fixture(autouse=True)
def fake_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_job, "TRAINER", TRAINER)


def write(folder: Path, *runs: str, head: str = HEAD) -> Path:
    path = folder / "list.toml"
    path.write_text(head + "".join(runs))
    return path


def call(folder: Path, *arguments: str) -> int:
    return sweep.main([str(folder / "list.toml"), "--output", str(folder / "out"), *arguments])


def rows(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """results.json by setting and seed."""
    found = json.loads((folder / "out" / "results.json").read_text())
    return {(row["setting"], row["seed"]): row for row in found}


def steps(folder: Path, name: str) -> list[int]:
    """The steps that a run's log shows, in order."""
    log = (folder / "out" / name / "log.txt").read_text().splitlines()
    return [step.number for line in log if (step := TrainingLog().read(line))]


# Lists


def test_runs_have_the_flags_of_all_and_their_own(tmp_path: Path) -> None:
    run = '[[run]]\nname = "a"\nflags = "--mapl-rank 8 --lr 2"\nseeds = [5, 6]\ntrain_iters = 3\n'
    plain = '[[run]]\nname = "p"\ntrain_iters = 3\nseeds = [5, 6]\n'
    extra = '[model]\nflags = "--lr 1"\n[mapl]\nflags = "--mapl-virtual-stages 4"\n'
    plan = sweep_list.read(write(tmp_path, extra, run, plain), None)
    assert [run.name for run in plan.runs] == ["a-s5", "a-s6", "p-s5", "p-s6"]
    first, _, other, _ = plan.runs
    values = ("--lr", "--mapl-virtual-stages", "--seed", "--train-iters", "--mapl-rank")
    assert [flag_value(first.flags, flag) for flag in values] == ["2", "4", "5", "3", "8"]
    assert [flag_value(other.flags, flag) for flag in values] == ["1", None, "5", "3", None]
    assert (first.steps, first.tokens, first.uncompressed) == (3, 24, False)
    assert (plan.save_interval, plan.processes, plan.keep_checkpoints) == (4, 1, False)


def test_placeholders_stand_for_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("{}")
    (tmp_path / "corpus.model").touch()
    head = HEAD.replace('[data]\nflags = ""', "")
    run = sweep_list.read(write(tmp_path, PLAIN, head=head), tmp_path / "corpus").runs[0]
    assert flag_value(run.flags, "--train-data-path") == f"{tmp_path}/corpus_train"
    cache = flag_value(run.flags, "--data-cache-path")
    (tmp_path / "corpus.json").write_text("{ }")
    run = sweep_list.read(tmp_path / "list.toml", tmp_path / "corpus").runs[0]
    assert flag_value(run.flags, "--data-cache-path") != cache


def test_a_dataset_with_a_tokenizer_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("{}")
    head = HEAD.replace('[data]\nflags = ""', "")
    with pytest.raises(SweepError, match=r"there is no .*corpus\.model; .*--tokenizer-model"):
        sweep_list.read(write(tmp_path, PLAIN, head=head), tmp_path / "corpus")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 3\n" + HEAD + PLAIN, "the list: 'speed' is unknown"),
        (HEAD + PLAIN + "rank = 3\n", "run \"plain\": 'rank' is unknown"),
        (HEAD + PLAIN + PLAIN, 'run "plain": its folder plain is that of run "plain" too'),
        (HEAD + RANK, "no uncompressed run of 80 tokens with seed 1234"),
        (HEAD + PLAIN + RANK + "seeds = [7]\n", "no uncompressed run of 80 tokens with seed 7"),
        (HEAD + PLAIN + RANK + "train_iters = 7\n", "no uncompressed run of 56 tokens"),
        (HEAD + PLAIN + PLAIN.replace("plain", "b"), 'runs "plain" and "b": all are uncompressed'),
        (HEAD + PLAIN + 'flags = "--save x"', "--save stands among the flags"),
        (HEAD + PLAIN + 'flags = "--seed=3"', "--seed stands among the flags"),
        (HEAD + PLAIN + 'flags = "--train-iters 3"', "set train_iters"),
        (HEAD + PLAIN + 'flags = "--eval-iters 0"', "--eval-iters 0"),
        (HEAD + PLAIN + 'flags = "\'"', "mend the quotes"),
        (HEAD + PLAIN + 'flags = "{data}"', "give it with --data"),
        (HEAD + PLAIN + "flags = 3", "flags = 3 must be a str"),
        (HEAD + PLAIN + "seeds = [0]", "positive whole numbers"),
        (HEAD + '[[run]]\nname = "../a"\n', "is to name a folder"),
        (HEAD, "it has no run"),
        (HEAD.replace("--train-iters 10", "") + PLAIN, "have no --train-iters"),
        (HEAD.replace("save_interval = 4", "save_interval = 0") + PLAIN, "must be at least 1"),
        (HEAD.replace("--train", "--mapl-rank 3 --train") + PLAIN, "none is uncompressed"),
        ("run = 3 =", "is not TOML"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    write(tmp_path, text, head="")
    assert call(tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and "list.toml" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_list_or_a_name_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path) == 2
    assert "No such file" in capsys.readouterr().err
    write(tmp_path, PLAIN)
    assert call(tmp_path, "--only", "other") == 2
    assert "has no run of that name; it has plain" in capsys.readouterr().err


# Runs


def test_runs_once_and_tells_what_it_came_to(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, RANK)
    assert call(tmp_path) == 0
    found = rows(tmp_path)
    plain, rank = found["plain", 1234], found["r16", 1234]
    base, loss = 1 + 0.01234 - 0.1, 1 + 0.01234 - 0.016
    assert plain["loss"] == pytest.approx(base) and plain["gap"] == 0
    assert rank["gap"] == pytest.approx(100 * (loss / base - 1), rel=1e-4)
    # 16 numbers of 2 bytes; 80 bytes of projectors a step of 8 tokens; evaluations left out
    assert rank["traffic"] | {"with_evaluations": 0} == {
        "forward": 32, "backward": 32, "once_a_step": 10, "uncompressed": 128,
        "with_evaluations": 0, "tokens": 80,
    }  # fmt: skip
    assert rank["ratio"] == pytest.approx(256 / 74)
    assert (plain["traffic"]["forward"], plain["ratio"]) == (128, 1)
    assert rank["seconds"] == pytest.approx(0.2)
    assert rank["tokens_per_second"] == pytest.approx(400)
    assert rank["flags"][-4:] == ["--mapl-rank", "16", "--seed", "1234"]
    assert not (tmp_path / "out" / "r16" / "checkpoint").exists()
    for name in ("pareto.png", "losses.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "| r16 " in (tmp_path / "out" / "results.md").read_text()
    before = (tmp_path / "out" / "r16" / "log.txt").read_text()
    assert call(tmp_path) == 0
    assert (tmp_path / "out" / "r16" / "log.txt").read_text() == before
    assert rows(tmp_path) == found


def test_gaps_while_training_are_those_of_entries_that_both_have() -> None:
    def row(setting: str, seed: int, *curve: tuple[int, float]) -> Row:
        return Row(setting, seed, "", "", setting == "plain", "finished", 100, curve=curve)

    plain = row("plain", 1, (10, 4.0), (20, 2.0), (40, 1.0))
    other_seed = row("plain", 2, (10, 1.0), (20, 1.0))
    longer = dataclasses.replace(row("plain", 1, (10, 8.0)), tokens=200)
    mapl = row("mapl", 1, (10, 4.4), (30, 9.0), (40, 1.1))
    rows = [plain, other_seed, longer, mapl]
    assert gaps_while_training(mapl, rows) == [(10, pytest.approx(10)), (40, pytest.approx(10))]
    assert gaps_while_training(dataclasses.replace(mapl, seed=3), rows) == []
    assert gaps_while_training(plain, rows) == []
    # Means of five entries, of both.
    bumpy = row("mapl", 2, (10, 1.5), (20, 1.0))
    assert gaps_while_training(bumpy, rows)[1] == (20, pytest.approx(25))


def test_curves_are_drawn_with_their_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The axes fit the later half of the runs within reach, and every run is named."""

    def row(setting: str, gap: float | None, *losses: float) -> Row:
        curve = tuple((10 * n, loss) for n, loss in enumerate(losses, start=1))
        return Row(
            setting, 1, setting, "a group", setting == "plain", "finished", 100, loss=losses[-1],
            gap=gap, curve=curve,
        )  # fmt: skip

    figures = []

    @contextmanager
    def picture(path: Path, **_: Any) -> Generator[Figure]:
        figures.append(Figure())
        yield figures[-1]

    monkeypatch.setattr(sweep_figures, "picture", picture)
    rows = [row("plain", 0.0, 8.0, 2.0), row("good", 1.0, 8.0, 2.2), row("bad", 99.0, 8.0, 9.0)]
    assert sweep_figures.draw_curves([*rows, row("fair", 2.0, 8.0, 2.4)], tmp_path / "p.png")
    (figure,) = figures
    losses, gaps = figure.axes
    # The mean of the up to five entries until then: 5.0 to 5.2, and 0 to 4%.
    for axes, low, high in ((losses, 5.0, 5.2), (gaps, 0.0, 4.0)):
        bottom, top = axes.get_ylim()
        margin = 0.1 * (high - low) + 1e-3
        assert (bottom, top) == pytest.approx((low - margin, high + margin))
    names = [text.get_text() for text in losses.get_legend().get_texts()]
    assert names[0] == "plain: 2.0000" and names[1] == "a group: good: 2.2000" and len(names) == 4
    assert len(gaps.lines) == 3 + 1  # and the line at zero
    # Without an uncompressed run there is nothing to compare with.
    assert sweep_figures.draw_curves([row("good", None, 8.0, 2.2)], tmp_path / "p.png")
    assert len(figures[1].axes) == 1
    # Hopeless ones alone have the axis to themselves.
    plain = [dataclasses.replace(rows[0], setting=f"plain-{n}") for n in range(3)]
    assert sweep_figures.draw_curves([*plain, rows[2]], tmp_path / "p.png")
    assert figures[2].axes[1].get_ylim()[1] > 60


def test_one_hopeless_setting_does_not_flatten_the_rest() -> None:
    def row(gap: float, ratio: float = 2.0) -> Row:
        traffic = TokenTraffic(1.0, 1.0, 0.0, ratio, 2.0, 100)
        return Row(f"{gap}", 1, f"{gap}", "", False, "finished", 100, gap=gap, traffic=traffic)

    ordinary = [row(gap) for gap in (0.0, 0.5, 1.0, 2.0, 3.0, 8.2)]
    assert within_reach(ordinary) == ordinary
    *others, hopeless = within_reach([*ordinary[:5], row(43.4)])
    assert others == ordinary[:5]
    assert hopeless.gap == 3.5 and hopeless.label == "43.4: +43% ↑"
    assert within_reach([*[row(0.0)] * 4, row(43.0)])[-1].gap == 0.5
    near_zero = [row(gap) for gap in (-0.4, -0.3, 0.0, 0.02, 0.5)]
    assert within_reach(near_zero) == near_zero
    # In the picture too, and the front is that of the gaps as measured.
    few = [row(gap) for gap in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
    figure = Figure()
    axes = figure.subplots()
    sweep_figures._draw_front(figure, axes, [*few, row(43.4, 8.0), row(30.0, 16.0)], 100)
    heights = [float(y) for line in axes.lines for y in line.get_ydata()]
    assert max(heights) == 3.5
    assert {text.get_text() for text in axes.texts} == {
        *(r.label for r in few),
        "43.4: +43% ↑",
        "30.0: +30% ↑",
    }
    (steps,) = [line for line in axes.lines if line.get_label() == "front"]
    assert list(steps.get_xdata()) == [2.0, 16.0]


def test_seeds_and_only(tmp_path: Path) -> None:
    write(tmp_path, PLAIN + "seeds = [1, 2]\n", RANK + "seeds = [1, 2]\n")
    assert call(tmp_path, "--only", "r16") == 0
    found = rows(tmp_path)
    assert found["plain", 1]["state"] == "not started"
    assert found["r16", 2]["gap"] is None and found["r16", 2]["loss"] is not None
    assert call(tmp_path) == 0
    assert rows(tmp_path)["r16", 2]["gap"] > 0
    assert "mean of 2 seeds" in (tmp_path / "out" / "results.md").read_text()


def test_a_crash_loses_nothing_else_and_is_retried_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crashing = RANK.replace("16", "8").replace("rank 8", "rank 8 --fake-crash 6")
    broken = RANK.replace("16", "9").replace("rank 9", "rank 9 --fake-broken")
    write(tmp_path, crashing, broken, RANK, PLAIN)
    assert call(tmp_path) == 1
    found = rows(tmp_path)
    assert found["r8", 1234]["state"] == "crashed: exit code 1: RuntimeError: boom at 6"
    assert found["r16", 1234]["state"] == found["plain", 1234]["state"] == "finished"
    assert "ValueError: a reason \\| to fail" in (tmp_path / "out" / "results.md").read_text()
    assert call(tmp_path) == 1
    assert steps(tmp_path, "r8") == [1, 2, 3, 4, 5, 6]
    assert call(tmp_path, "--retry", "--only", "r8") == 1  # r9 is still crashed
    assert steps(tmp_path, "r8") == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]
    retried = json.loads((tmp_path / "out" / "r8" / "result.json").read_text())
    assert [number for number, _ in retried["losses"]] == list(range(1, 11))
    assert retried["traffic"]["tokens"] == 80  # each step once, whatever was done twice
    assert retried["traffic"]["forward"] == 16 and retried["traffic"]["once_a_step"] == 10
    capsys.readouterr()


def test_changed_flags_are_refused_until_redone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, PLAIN, RANK)
    assert call(tmp_path) == 0
    write(tmp_path, PLAIN, RANK.replace("rank 16", "rank 24") + 'label = "new"\n')
    assert call(tmp_path) == call(tmp_path, "--report-only") == 2
    error = capsys.readouterr().err
    assert "it had '--mapl-rank 16', the list has '--mapl-rank 24'" in error
    assert "--redo r16" in error
    assert call(tmp_path, "--redo", "r16") == 0
    assert rows(tmp_path)["r16", 1234]["traffic"]["forward"] == 48
    assert steps(tmp_path, "r16") == list(range(1, 11))
    write(tmp_path, PLAIN, RANK.replace("rank 16", "rank 24") + 'label = "newer"\n')
    assert call(tmp_path, "--report-only") == 0
    assert rows(tmp_path)["r16", 1234]["label"] == "newer"


def test_report_only_runs_nothing_and_needs_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("{}")
    data = HEAD.replace('flags = ""', 'flags = "{data}"')
    trainer = PLAIN + RANK
    write(tmp_path, trainer, head=data)
    assert call(tmp_path, "--report-only") == 0
    assert {row["state"] for row in rows(tmp_path).values()} == {"not started"}
    assert not (tmp_path / "out" / "plain").exists()


SLOW = RANK.replace("rank 16", "rank 16 --fake-seconds 0.2")


def test_seconds_stop_and_the_next_call_goes_on(tmp_path: Path) -> None:
    write(tmp_path, SLOW, PLAIN)
    assert call(tmp_path, "--seconds", "1") == 3  # of 2 s and a start
    assert rows(tmp_path)["r16", 1234]["state"] == "not finished"
    assert rows(tmp_path)["plain", 1234]["state"] == "not started"
    assert call(tmp_path) == 0
    assert steps(tmp_path, "r16") == list(range(1, 11))
    traffic = rows(tmp_path)["r16", 1234]["traffic"]
    assert (traffic["tokens"], traffic["forward"], traffic["once_a_step"]) == (80, 32, 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_and_the_next_call_goes_on(tmp_path: Path, number: int) -> None:
    write(tmp_path, SLOW, PLAIN)
    patched = f"import sweep, sweep_job, sys; sweep_job.TRAINER = {str(TRAINER)!r}; "
    patched += "sys.exit(sweep.main(sys.argv[1:]))"
    command = [sys.executable, "-c", patched, str(tmp_path / "list.toml")]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], cwd=TOOLS, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "out" / "r16" / "log.txt"
    wait_for(lambda: log.exists() and " iteration        2" in log.read_text())
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"Stopped by {signal.Signals(number).name}" in output
    assert "exiting program after receiving SIGTERM" in log.read_text()
    assert call(tmp_path) == 0
    assert steps(tmp_path, "r16") == list(range(1, 11))


def test_workers_have_a_gpu_each_and_all_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    write(tmp_path, SLOW, SLOW.replace("16", "24"), PLAIN)
    logs = [tmp_path / "out" / name / "log.txt" for name in ("r16", "r24")]

    def interrupt() -> None:
        wait_for(lambda: all(log.exists() and "        1/" in log.read_text() for log in logs))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert call(tmp_path, "--workers", "2") == 3
    thread.join()
    for log, gpu in zip(logs, (4, 7), strict=True):
        assert f"GPU {gpu}," in log.read_text() and "exiting program" in log.read_text()
    assert not (tmp_path / "out" / "plain").exists()
    assert call(tmp_path, "--workers", "2") == 0
    assert steps(tmp_path, "r16") == steps(tmp_path, "r24") == list(range(1, 11))


def test_workers_need_as_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert devices(1, 4) == [None]
    assert devices(3, 1) == ["0", "1", "2"]
    with pytest.raises(SweepError, match="--workers 2 need 4 GPUs"):
        devices(2, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices(2, 2) == ["0,1", "2,3"]


def test_no_two_jobs_index_the_same_samples_at_once(tmp_path: Path) -> None:
    seeds = "seeds = [1, 2]\n"
    plan = sweep_list.read(write(tmp_path, PLAIN + seeds, RANK + seeds), None)
    waiting = [RunFolder(run, tmp_path) for run in plan.runs]
    first, second, third, fourth = waiting
    assert take_next(waiting, [], ()) is first
    assert take_next(waiting, [first], ()) is second
    assert take_next(waiting, [first, second], ()) is None
    assert take_next(waiting, [first, second], {(2, 80)}) is fourth
    assert take_next(waiting, [second, fourth], {(2, 80)}) is third  # the first one is over
    assert waiting == []


def test_a_run_is_not_trained_twice_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = sweep_list.read(write(tmp_path, SLOW, PLAIN), None)
    job = Job(RunFolder(plan.runs[0], tmp_path / "out"), plan, devices=None, share=1)
    try:
        assert call(tmp_path) == 0
        assert "is being trained by another call" in capsys.readouterr().out
        assert rows(tmp_path)["plain", 1234]["state"] == "finished"
    finally:
        job.kill()
    assert call(tmp_path) == 0
    assert rows(tmp_path)["r16", 1234]["state"] == "finished"


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Figures


def report(tokens: int, *, payloads: tuple[int, int], sizes: tuple[int, int]) -> dict[str, Any]:
    kinds = dict.fromkeys(("header", "ids", "latents", "indices", "scales", "codebook"), 0)

    def entry(count: int, size: int) -> dict[str, int]:
        return {**kinds, "projector": 0, "latents": count * size, "payloads": count}

    boundary = {
        "boundary": 0,
        "forward": entry(payloads[0], sizes[0]),
        "backward": entry(payloads[1], sizes[1]),
        "forward_codebook": {**kinds, "projector": 0, "codebook": 7, "payloads": 1},
        "uncompressed": sum(payloads) * 40,
    }
    return {"tokens": tokens, "boundaries": [boundary]}


def test_bytes_a_token_leave_evaluations_out_and_count_whole_codebooks_apart() -> None:
    parts = [report(20, payloads=(5, 2), sizes=(10, 6)), report(30, payloads=(3, 3), sizes=(10, 6))]
    found = token_traffic(parts)
    assert found == TokenTraffic(
        forward=pytest.approx(5 * 10 / 50),
        backward=pytest.approx(5 * 6 / 50),
        once_a_step=pytest.approx(14 / 50),
        uncompressed=pytest.approx(5 * 40 / 50),
        with_evaluations=80 + 30 + 14,
        tokens=50,
    )
    assert found.ratio == pytest.approx(400 / (50 + 30 + 14))
    with pytest.raises(ValueError, match="no traffic report"):
        token_traffic([])


def row(name: str, ratio: float, gap: float, *, seed: int = 1, tokens: int = 10) -> Row:
    size = 100 / ratio
    traffic = TokenTraffic(size, size, 0.0, 100.0, 0, tokens)
    return Row(
        name, seed, name, "", False, "finished", tokens, loss=2 + gap / 50, gap=gap,
        traffic=traffic, seconds=1.0, tokens_per_second=10.0,
    )  # fmt: skip


def test_the_front_has_what_no_other_beats_or_equals() -> None:
    given = [row("a", 1, 0), row("b", 4, 3), row("worse", 4, 5), row("c", 8, 2), row("d", 16, 9)]
    given += [row("dearer", 7, 2), row("e", 30, 9.5), row("bad", 20, 20)]
    assert [r.setting for r in front(given)] == ["a", "c", "d", "e"]


def test_means_over_seeds() -> None:
    (mean,) = means([row("a", 4, 1.0, seed=1), row("a", 4, 2.0, seed=2)])
    assert (mean.seed, mean.gap, mean.gap_spread) == (None, 1.5, 0.5)
    assert mean.loss == pytest.approx(2.03) and mean.loss_spread == pytest.approx(0.01)
    assert "+1.50% ± 0.50" in page([row("a", 4, 1.0, seed=1), row("a", 4, 2.0, seed=2)],
                                   markdown=False)  # fmt: skip
    assert means([row("a", 4, 1.0)])[0].seed == 1


def test_different_lengths_and_lost_reports_are_told() -> None:
    lost = row("a", 4, 1.0, tokens=10)
    other = row("b", 4, 1.0, tokens=20)
    text = page([lost, other], markdown=True)
    assert "Runs of different lengths" in text and "was killed before" not in text
    short = TokenTraffic(1.0, 1.0, 0.0, 4.0, 0, 7)
    text = page([Row("c", 1, "c", "", False, "finished", 10, 2.0, 1.0, traffic=short)],
                markdown=True)  # fmt: skip
    assert "c (7 of 10 tokens)" in text


def line(number: int, seconds: float, loss: float) -> str:
    """Of Megatron's log."""
    time = f"elapsed time per iteration (ms): {seconds * 1e3}"
    return f"iteration {number:4}/ 9 | {time} | lm loss: {loss} |"


START = "[before the start of training step] datetime: 2026-01-01"


def test_the_first_step_is_taken_out_of_the_means_that_have_it_too() -> None:
    """Each second step, say, is logged: Megatron logs 1, then the means of 1 and 2, of 3 and 4."""
    log = TrainingLog.of([START, line(1, 9.0, 5.0), line(2, 5.0, 4.5), line(4, 2.0, 3.5)])
    assert log.losses == [(1, 5.0), (2, 4.0), (4, 3.5)]
    assert log.seconds == pytest.approx(9 + 1 + 2 * 2)
    assert log.median_step == 2.0


def test_a_resumed_run_takes_the_place_of_what_it_repeats() -> None:
    validation = " validation loss at iteration {} | lm loss value: {} | x"
    log = TrainingLog.of(
        [START, line(1, 1, 5), line(2, 1, 5), line(4, 1, 4), validation.format(4, 4.5),
         line(6, 1, 9), validation.format(6, 9), START, line(6, 2, 3), line(8, 2, 3)]
    )  # fmt: skip
    assert log.losses == [(1, 5), (2, 5), (4, 4), (6, 3), (8, 3)]
    assert log.validations == [(4, 4.5)]
    assert log.seconds == pytest.approx((4 * 1 + 3 * 2) / 7 * 8)  # nothing was logged of step 5


def test_the_evaluation_at_the_end_is_told_from_others() -> None:
    log = TrainingLog.of(
        [START, line(4, 1, 5), " validation loss at iteration 4 | lm loss value: 4.5 | x",
         " validation loss at iteration 4 on test set | lm loss value: 9 | x"]
    )  # fmt: skip
    assert log.finished is None and log.validations == [(4, 4.5)]
    log.read(" validation loss at iteration 4 on validation set | lm loss value: 4.4 | x")
    assert log.finished == 4 and log.validations == [(4, 4.4)]
