# SPDX-License-Identifier: Apache-2.0
"""The commands in README and docs, taken from the pages."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "llama" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
_PROGRAMS = (
    r"(?:python3?|torchrun|sudo|make|pip|source|sbatch|srun|scancel|scontrol|ip|git|docker|bash"
    r"|compute-sanitizer|cd|export|apptainer|apt-get|apt|\.|\S*/(?:python|train\.sh))"
)
#: Variables, then a program; in blocks perhaps behind a prompt.
_COMMAND = re.compile(rf"(?:\$ )?((?:[A-Z_]+=\S+ )*{_PROGRAMS} \S.*|(?:\S*/)?train\.sh .*)", re.S)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Command:
    """One command as a page has it.

    Attributes:
        page: its path in the repository.
        text: on one line, without prompt, continuations and comments.
        output: what the page says that it prints, if it follows in the same block.
    """

    page: str
    text: str
    output: str = ""


def blocks(text: str) -> Iterator[str]:
    """Code that stands by itself: fenced, or indented by four columns behind an empty line."""
    lines = [*text.splitlines(), ""]
    block: list[str] = []
    fenced = False
    before = ""
    for line in lines:
        if line.startswith("```"):
            if fenced:
                yield "\n".join(block)
                block = []
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (block or not before.strip())):
            block.append(line if fenced else line[4:])
        elif not line.strip() and block:
            block.append("")
        elif block:
            yield "\n".join(block).rstrip()
            block = []
        before = line
    if block:
        yield "\n".join(block).rstrip()


def prose(text: str) -> str:
    """All but the blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*\n|\n(?= {4}))+", "\n", text)


def _statements(block: str) -> Iterator[str]:
    """Lines, those that go on joined."""
    yield from re.sub(r" *\\\n *", " ", block).splitlines()


def _tidy(command: str) -> str:
    return " ".join(re.sub(r" # .*", "", command).split())


@cache
def commands() -> list[Command]:
    """Those of all pages, in blocks and in the text."""
    found = []
    for path in PAGES:
        text, page = path.read_text(), str(path.relative_to(ROOT))
        for block in blocks(text):
            statements = list(_statements(block))
            places = [i for i, line in enumerate(statements) if _COMMAND.fullmatch(line)]
            for place, following in pairwise([*places, len(statements)]):
                match = _COMMAND.fullmatch(statements[place])
                assert match
                output = "\n".join(statements[place + 1 : following]).strip("\n")
                found.append(Command(page, _tidy(match[1]), output))
        for span in re.findall(r"`([^`]+)`", prose(text)):
            if match := _COMMAND.fullmatch(_tidy(span)):
                found.append(Command(page, match[1]))
    return found


def flags() -> dict[str, set[str]]:
    """Flag → the pages that name it, in blocks and in code within the text."""
    named: dict[str, set[str]] = {}
    for path in PAGES:
        text = path.read_text()
        code = [*blocks(text), *re.findall(r"`([^`]+)`", prose(text))]
        for flag in FLAG.findall("\n".join(code)):
            named.setdefault(flag, set()).add(str(path.relative_to(ROOT)))
    return named


def other_lines_with_flags() -> list[str]:
    """Lines of blocks that have flags and were taken for no command and no list of flags."""
    strange = []
    for path in PAGES:
        for block in blocks(path.read_text()):
            taken = {line for line in _statements(block) if _COMMAND.fullmatch(line)}
            for line in _statements(block):
                if line in taken or line.lstrip().startswith("--") or not FLAG.search(line):
                    continue
                strange.append(f"{path.name}: {line.strip()}")
    return strange


#: What stands for something in a command, and such a thing.
_PLACEHOLDERS = {"C": "int8", "DIR": "folder", "CORPUS": "corpus"}
_TOOL = re.compile(r"\btools/(\w+)\.py\b")


def tool_of(text: str) -> str | None:
    """The name of the tool that a command runs, if it does."""
    match = _TOOL.search(text)
    return match[1] if match else None


def arguments(text: str) -> tuple[str, list[str]]:
    """The path of the tool of a command, and its arguments."""
    words = shlex.split(text.replace("[", "").replace("]", ""))
    place = next(i for i, word in enumerate(words) if _TOOL.search(word))
    return words[place], [_PLACEHOLDERS.get(word, word) for word in words[place + 1 :]]
