# SPDX-License-Identifier: Apache-2.0
"""Every command in README and docs is run, here or by a test that is named, or TABLE says why not.

Those of Megatron's scripts have their flags read in tests/cpu_mode/test_docs_flags.py.
"""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from documented_commands import (
    PAGES,
    ROOT,
    arguments,
    commands,
    other_lines_with_flags,
    tool_of,
)

HERE = "run here"
SETUP = "not run: makes or removes the environment that this runs in"
SELF = "it is what runs these tests"
GPU = "not run: needs a GPU"
ROOT_USER = "not run: needs root, and half an hour"
HOURS = "not run: trains for minutes to days"
INSTALLS = "not run: downloads packages"
CLUSTER = "not run: needs a cluster's own programs"

_LAUNCHER = "tests/distributed/test_llama_launcher.py"
_SLURM = "tests/distributed/test_llama_slurm.py::test_every_node_trains"
_HF = "tests/distributed/test_hugging_face.py"
_SCRIPTS = "tests/distributed/test_scripts.py"
_DATA = "tests/unit/test_prepare_data.py"
_SWEEP = "tests/unit/test_sweep.py"
_SWEEPS = "tests/cpu_mode/test_sweep_lists.py::test_flags_are_taken"

#: Command, or its beginning before …, → what runs it or why nothing does. A test is named by its
#: file, and runs the same program with a smaller job.
TABLE = {
    "make test": SELF,
    'make test ARGS="-k checkpoint -x"': SELF,
    "make test WORKERS=4": SELF,
    "make lint types": SELF,
    "make test-older": "not run: installs another Megatron; by hand, and before releases",
    "make docs": "tests/unit/test_docs_site.py::site",
    "make demo": HOURS,
    "make setup": SETUP,
    "make setup MAPL_PYTHON=/path/to/python3.12": SETUP,
    "make clean": SETUP,
    "source .venv/bin/activate": "not run: it is the shell's",
    ".venv/bin/python -m pip install -e '.[gpu]'": INSTALLS,
    "pip install -e '.[gpu]'": INSTALLS,
    "pip install --dry-run -c c.txt megatron-bridge": INSTALLS,
    # Data
    "python tools/prepare_data.py --input corpus/*.jsonl …": _DATA,
    "python tools/prepare_data.py --input english/*.jsonl.xz …": _DATA,
    "python tools/prepare_data.py --input code/*.jsonl.xz …": _DATA,
    "python tools/prepare_data.py --input CORPUS …": _DATA,
    "python tools/prepare_data.py --source stdlib …": f"{_DATA}::test_stdlib_source",
    # Training
    "DATA=data/corpus sbatch --nodes=4 examples/llama/slurm/bare-metal.sbatch 1b": _SLURM,
    "DATA=data/corpus sbatch --nodes=4 --account=NAME …": _SLURM,
    "DATA=data/corpus NETWORK_INTERFACE=wg0 sbatch …": (
        "tests/distributed/test_llama_slurm.py::"
        "test_the_master_listens_on_the_network_that_is_asked_for"
    ),
    "CONTAINER_IMAGE=image.sqsh DATA=data/corpus sbatch …": _SLURM,
    "DATA=data/corpus examples/llama/train.sh 150m": (
        f"{_LAUNCHER}::test_a_node_gets_a_process_for_each_gpu"
    ),
    "DATA=data/stdlib examples/llama/train.sh tiny": (
        f"{_LAUNCHER}::test_a_laptop_gets_a_process_for_each_stage"
    ),
    "NNODES=4 NODE_RANK=0 MASTER_ADDR=node-0 …": f"{_LAUNCHER}::test_one_node_of_many",
    "DATA=data/corpus NPROC_PER_NODE=4 examples/llama/train.sh …": f"{_LAUNCHER}::test_processes_may_share_a_gpu",
    "SAVE=checkpoints/150m-plain DATA=data/corpus PLAIN=1 …": (
        f"{_LAUNCHER}::test_plain_megatron_is_the_recipe_without_boundaries"
    ),
    "SAVE=checkpoints/150m-paper DATA=data/corpus examples/llama/train.sh 150m …": (
        "tests/cpu_mode/test_recipe_flags.py::test_the_papers_setting_of_its_sizes"
    ),
    "NPROC_PER_NODE=2 DATA=data/stdlib examples/llama/train.sh tiny …": (
        f"{_LAUNCHER}::test_processes_may_share_a_gpu"
    ),
    "train.sh --help": HERE,
    "torchrun --nproc-per-node 4 pretrain_gpt.py --pipeline-model-parallel-size 4 …": (
        "tests/distributed/test_torchrun.py::test_torchrun_starts_the_same_job"
    ),
    "torchrun --standalone --nproc-per-node 4 pretrain_gpt.py …": (
        "tests/distributed/test_traffic.py::test_an_emulated_network_changes_no_loss"
    ),
    "torchrun --nproc-per-node 8 -m megatron.mapl pretrain_gpt.py …": (
        f"{_SCRIPTS}::test_torchrun_starts_the_same_job"
    ),
    "python -m megatron.mapl SCRIPT ARGS…": (
        f"{_SCRIPTS}::test_python_starts_a_script_of_a_checkout"
    ),
    "python -m megatron.mapl": "tests/unit/test_entry.py::test_without_a_script",
    "python SCRIPT": f"{_SCRIPTS}::test_without_the_flag_it_is_plain_megatron",
    "python pretrain_gpt.py … --mapl-rank 256 … --mapl-report-dir out/learned": (
        "tests/distributed/test_virtual_stages.py::test_equals_the_pipeline"
    ),
    "python pretrain_gpt.py … --mapl-rank 256 … --mapl-projector fixed": (
        "tests/distributed/test_virtual_stages.py::test_equals_the_pipeline"
    ),
    'python tools/demo.py --mapl-flags …60 --mapl-anchor-buckets 131072"': HOURS,
    'python tools/demo.py --mapl-flags …FLAGS --eval-iters 16 --seed SEED"': HOURS,
    # Results
    "python tools/sweep.py tools/sweeps/headline.toml … --data data/english": _SWEEPS,
    "python tools/sweep.py tools/sweeps/headline.toml … --data data/source": _SWEEPS,
    "python tools/sweep.py tools/sweeps/headline.toml … --workers 8 --seconds 3300": (
        f"{_SWEEP}::test_seconds_stop_and_the_next_call_goes_on"
    ),
    "python tools/sweep.py tools/sweeps/search.toml …": _SWEEPS,
    "python tools/report.py out/learned out/fixed …": (
        "tests/unit/test_report_geometry.py::test_command_line_draws_both"
    ),
    "python tools/report.py runs/plain runs/mine …": (
        "tests/unit/test_report.py::test_command_line_prints_and_draws"
    ),
    "python pretrain_gpt.py … --tensorboard-dir out/plain": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    "python pretrain_gpt.py … --tensorboard-dir out/mapl": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    "python tools/report.py out/plain out/mapl …": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    # Conversion
    "python tools/convert_to_hf.py --load runs/mine --output mine-hf": f"{_HF}::exact",
    "python tools/convert_to_hf.py --load checkpoints/mine …": f"{_HF}::exact",
    "python tools/convert_to_hf.py --load runs/mine --output mine-plain …": f"{_HF}::plain",
    "python tools/convert_from_hf.py …": f"{_HF}::test_round_trips",
    "python -m pytest -n0 -rP --show-capture=stdout tests/distributed/test_hugging_face.py": SELF,
    # Planning
    "python tools/traffic_budget.py --hidden-size 4096 --rank 1280 …": HERE,
    "python tools/traffic_budget.py --hidden-size 4096 --rank 512 …": HERE,
    "python tools/traffic_budget.py --hidden-size 2048 …": HERE,
    "python tools/plan.py …": (
        "tests/unit/test_plan.py::test_the_docs_have_what_the_command_prints"
    ),
    "python tools/check_plan.py docs/planning-bench.json": (
        "tests/unit/test_check_plan.py::test_the_docs_state_the_errors_of_the_bench"
    ),
    "torchrun --nnodes 4 … tools/measure_links.py …": (
        "tests/distributed/test_measure_links.py::test_all_pairs_under_torchrun"
    ),
    # Benches
    "sudo .venv/bin/python tools/bench_slow_network.py": ROOT_USER,
    "sudo .venv/bin/python tools/bench_slow_network.py [--quick]": ROOT_USER,
    "sudo .venv/bin/python tools/bench_slow_network.py --quick …": ROOT_USER,
    "python tools/bench_emulated_link.py --rounds 9": "not run: measures times, for minutes",
    "python tools/bench_pipeline.py --layout gloo-pp4": GPU,
    "python tools/bench_pipeline.py --layout nccl-pp2-vpp2": GPU,
    "python tools/bench_pipeline.py --layout single": GPU,
    "python tools/bench_pipeline.py --layout gloo-pp4 --settings …": GPU,
    "python tools/bench_pipeline.py --layout gloo-pp4 --rounds 1 --steps 10": GPU,
    "python tools/bench_ops.py": GPU,
    "python tools/bench_ops.py --quick": GPU,
    "python tools/bench_ops.py --json ops.json": GPU,
    "python tools/bench_ops_plot.py …": "not run: draws what bench_ops.py measures on a GPU",
    "python tools/bench_host.py": GPU,
    "python tools/compile_ops.py": (
        "tests/unit/test_ops_compile.py::test_kernels_compile_for_hopper"
    ),
    ".venv/bin/python -m pytest tests/gpu": GPU,
    "python -m pytest tests/gpu": GPU,
    "python -m pytest tests/gpu/test_staging_cuda.py …": GPU,
    "python -m pytest tests/gpu/test_nccl.py": GPU,
    "python -m pytest tests/gpu/test_cuda.py …": GPU,
    "compute-sanitizer --tool memcheck": GPU,
    # Named in the text
    "apptainer exec --nv": CLUSTER,
    "srun --container-image": CLUSTER,
    "scancel --signal=USR1": CLUSTER,
    "scontrol requeue": CLUSTER,
    "ip -br addr": CLUSTER,
}
ALL = sorted({command.text for command in commands()})


def matches(key: str, text: str) -> bool:
    parts = map(re.escape, key.split("…"))
    return key == text or bool("…" in key and re.fullmatch(".*".join(parts), text))


def verdict(text: str) -> str:
    keys = [text] if text in TABLE else [key for key in TABLE if matches(key, text)]
    assert keys, f"{text!r} is new in the docs: say in TABLE which test runs it, or why none does"
    assert len(keys) == 1, f"{text!r} is meant by several of TABLE: {keys}"
    return TABLE[keys[0]]


@cache
def functions(file: str) -> set[str]:
    """Names of the tests and fixtures of a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("text", ALL)
def test_a_command_is_run_or_not_for_a_reason(text: str) -> None:
    said = verdict(text)
    if not said.startswith("tests/"):
        return
    file, _, function = said.partition("::")
    assert not function or function in functions(file), f"{text!r}: {file} has no {function}"


def test_the_table_has_no_more() -> None:
    unused = [key for key in TABLE if not any(matches(key, text) for text in ALL)]
    assert not unused, f"no page has {unused[0]!r} any more"


def test_no_command_is_overlooked() -> None:
    assert not other_lines_with_flags()


def test_a_new_command_is_seen() -> None:
    with pytest.raises(AssertionError, match="is new in the docs"):
        verdict("python tools/bench_ops.py --slow")


@pytest.mark.parametrize("text", ALL)
def test_its_files_are_there(text: str) -> None:
    for word in re.findall(r"(?:tools|tests|examples|docs)/[\w./-]+", text):
        assert (ROOT / word).exists(), f"{text!r}: there is no {word}"


def printed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Runs a tool as its command does, in a folder of its own."""
    tool, words = arguments(text)
    words = [str(ROOT / word) if word.startswith("docs/") else word for word in words]
    monkeypatch.setattr(sys, "argv", [str(ROOT / tool), *words])
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    return capsys.readouterr().out


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_budget_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [command for command in commands() if command.output]
    assert [tool_of(command.text) for command in shown] == ["traffic_budget", "plan"]
    found = printed(shown[0].text, tmp_path, monkeypatch, capsys)
    assert lines(found) == lines(shown[0].output)


def test_the_guides_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = next(text for text in ALL if "traffic_budget.py --hidden-size 2048" in text)
    assert "ratio 8." in printed(text, tmp_path, monkeypatch, capsys)


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table's rows under the header that begins with `first`."""
    text = (ROOT / page).read_text()
    table = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_table_of_codecs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/codecs.md, bytes a token, each row by the command above it."""
    text = next(text for text in ALL if "--forward-codec C --backward-codec C" in text)
    table = rows("docs/codecs.md", "codec | bytes a token forward")
    assert len(table) == 7
    for name, forward, backward, ratio in table:
        words = [word.split() for word in re.findall(r"`([^`]+)`", name)]
        codecs = [word for (word, *more) in words if not more]
        more = [word for part in words if len(part) > 1 for word in part]
        one = text.replace("--forward-codec C", f"--forward-codec {codecs[0]}")
        one = one.replace("--backward-codec C", f"--backward-codec {codecs[-1]}")
        found = printed(" ".join([one, *more]), tmp_path, monkeypatch, capsys)
        assert re.search(rf"forward +{forward} bytes a token", found), name
        assert re.search(rf"backward +{backward} bytes a token", found), name
        assert round(float(re.findall(r"ratio ([\d.]+)", found)[0]), 2) == float(ratio.rstrip("×"))


def test_train_sh_tells_its_variables() -> None:
    command = ["bash", "examples/llama/train.sh", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "NETWORK_INTERFACE" in done.stdout and "150m" in done.stdout


@pytest.mark.parametrize("text", [text for text in ALL if text.startswith("make ")])
def test_make_has_its_targets(text: str) -> None:
    """Read, not run: even with -n make runs the recipes that call make again, pytest among them."""
    makefile = (ROOT / "Makefile").read_text()
    for word in shlex.split(text)[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$\({name}\b|\$\(or \$\({name}\)" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), word


def test_all_pages_are_read() -> None:
    assert {path.name for path in PAGES} >= {"README.md", "guide.md", "clusters.md", "planning.md"}
    assert len(commands()) > 80
