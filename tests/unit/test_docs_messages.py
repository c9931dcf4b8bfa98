# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes messages as the code prints them."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
#: Stands for what a message fills in.
HOLE = "\0"


def quoted() -> list[str]:
    """The code in the first cell of each row of the tables of messages."""
    found = []
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| `([^`]+)` \| .+ \|$", line):
            found.append(match[1])
    return found


def python_strings(path: Path) -> list[str]:
    """All literals but docstrings; adjacent ones are one, what an f-string fills in is a hole."""
    strings = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Nobody sees a docstring when a program runs, a tool's --help apart.
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
            strings.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    return strings


def shell_text(path: Path) -> str:
    """A script with words that stand in several strings joined, and its variables as holes."""
    joined = re.sub(r'"\s*\\?\n\s*"', " ", path.read_text())
    return re.sub(r"\$\([^()]*\)|\$\{[^{}]*\}|\$\w+", HOLE, joined)


@cache
def messages() -> list[str]:
    strings = [shell_text(path) for path in (ROOT / "examples" / "llama").rglob("*.s*h")]
    strings += [shell_text(path) for path in (ROOT / "examples" / "llama").rglob("*.sbatch")]
    strings.append(shell_text(ROOT / "Makefile"))
    for folder in ("mapl", "megatron/mapl", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            strings += python_strings(path)
    return strings


def said(quote: str) -> bool:
    """Whether one message has all parts of the quote, in order, with holes or text between."""
    parts = [re.escape(part) for part in re.split(r"\s*…\s*", quote) if part]
    pattern = re.compile(r"[\s\S]{0,400}?".join(parts))
    return any(pattern.search(text) for text in messages())


def test_there_are_messages() -> None:
    assert len(quoted()) > 40
    assert all(len(max(quote.split("…"), key=len)) >= 10 for quote in quoted())


@pytest.mark.parametrize("quote", quoted())
def test_the_code_says_it(quote: str) -> None:
    assert said(quote), f"no message in the code reads: {quote}"


def test_another_message_would_be_seen() -> None:
    assert not said("a pipeline of one stage has no boundary to squeeze")
    assert not said("gives … boundaries for … ranks")
    assert not said("Adds up the ledgers of all processes")  # a docstring
