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
from documented_table import FLAGS_READ, TABLE

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
    said = verdict(text).removeprefix(FLAGS_READ).strip()
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
