# SPDX-License-Identifier: Apache-2.0
"""The flags in README and docs exist: Megatron, MAPL and the tools read them, values and all.

Here, where Megatron is imported already. tests/unit/test_docs_commands.py says who runs them.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron.mapl import arguments as mapl_arguments
from megatron.mapl import pretraining
from tests.cpu_mode.flag_parsing import Parse
from tests.unit.documented_commands import FLAG, ROOT, arguments, commands, flags, tool_of

COMMANDS = sorted({command.text for command in commands()})
#: Of programs that are none of this project's, by the program.
OTHERS = {
    "torchrun": {
        "--nproc-per-node",
        "--nnodes",
        "--node-rank",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--standalone",
        "--master-addr",
        "--master-port",
    },
    "sbatch, srun, scancel": {
        "--account",
        "--container-image",
        "--exclusive",
        "--gpus-per-node",
        "--mem",
        "--nodes",
        "--partition",
        "--requeue",
        "--signal",
    },
    "apptainer": {"--nv"},
    "pip": {"--dry-run", "--only-binary"},
    "compute-sanitizer": {"--tool"},
    "mkdocs": {"--strict"},
    "pytest and git hosts": {"--pdb", "--show-capture"},
}


class _Parsed(Exception):
    """A tool has read its flags; it goes no further."""


def has_flags(path: Path) -> bool:
    source = path.read_text()
    return "__main__" in source and ("Parser(" in source or "data_arguments" in source)


def parser_of(
    path: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> argparse.ArgumentParser:
    """The parser of a tool, which reads `words` if there are any."""
    found = []
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found.append(self)
        if words:
            _, unknown = parse(self, *args, **kwargs)
            assert not unknown
        raise _Parsed

    with monkeypatch.context() as context:
        context.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        context.setattr(sys, "argv", [str(ROOT / path), *words])
        with pytest.raises(_Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")
    return found[0]


@pytest.mark.parametrize("text", [text for text in COMMANDS if tool_of(text)])
def test_a_tool_reads_its_flags(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of their values, as it would if it ran."""
    path, words = arguments(text)
    if has_flags(ROOT / path):
        parser_of(path, words, monkeypatch)
    else:
        assert not words, f"{path} takes no flags"


@pytest.fixture(scope="module")
def megatron_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return mapl_arguments.add_arguments(parser)


def of_megatron(text: str) -> list[str] | None:
    """What a command gives to Megatron's parser."""
    words = shlex.split(re.sub(r"[\[\]]|…|ARGS", " ", text))
    for end in ("pretrain_gpt.py", "examples/llama/train.sh", ".sbatch"):
        places = [i for i, word in enumerate(words) if word.endswith(end)]
        if places:
            recipes = end != "pretrain_gpt.py"
            return words[places[0] + 1 + recipes :]
    if "--mapl-flags" in words:
        given = words[words.index("--mapl-flags") + 1]
        return shlex.split(given.replace("FLAGS", "").replace("SEED", "1"))
    return None


@pytest.mark.parametrize("text", [text for text in COMMANDS if of_megatron(text)])
def test_megatron_reads_its_flags(text: str, megatron_parser: argparse.ArgumentParser) -> None:
    words = of_megatron(text)
    assert words
    megatron_parser.parse_args(words)


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/planning.md"])
def test_a_whole_job_is_taken(page: str, parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that name all of a model: Megatron and MAPL settle on them."""
    (text,) = {
        command.text
        for command in commands()
        if command.page == page and "pretrain_gpt.py --pipeline" in command.text
    }
    words = of_megatron(text)
    assert words
    monkeypatch.setenv("WORLD_SIZE", "4")
    more = "--tokenizer-type NullTokenizer --vocab-size 31999"  # for there is no dataset
    args, runtime = parse([*words, *more.split()])
    assert (args.pipeline_model_parallel_size, runtime.plan.ranks) == (4, (64, 64, 64))


def test_every_flag_that_a_page_names_exists(
    megatron_parser: argparse.ArgumentParser,
    job: pretraining.Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {*megatron_parser._option_string_actions, *(f for own in OTHERS.values() for f in own)}
    for path in sorted((ROOT / "tools").glob("*.py")):
        if has_flags(path):
            parser = parser_of(str(path.relative_to(ROOT)), [], monkeypatch)
            known |= parser._option_string_actions.keys()
    # `--mapl-*` stands for many.
    named = {flag: pages for flag, pages in flags().items() if not flag.endswith("-")}
    assert len(named) > 100
    assert not {flag: pages for flag, pages in named.items() if flag not in known}


def test_no_flag_of_ours_is_left_out(megatron_parser: argparse.ArgumentParser) -> None:
    """docs/flags.md lists all of MAPL's; some of a kind in short, as `-rounds`."""
    page = (ROOT / "docs" / "flags.md").read_text()
    ours = [flag for flag in megatron_parser._option_string_actions if flag.startswith("--mapl-")]
    assert len(ours) > 25
    named = set(FLAG.findall(page))
    for stem, ends in re.findall(r"`(--mapl-[a-z-]+)-[a-z]+`((?:, `-[a-z]+`)+)", page):
        named |= {f"{stem}-{end}" for end in re.findall(r"`-([a-z]+)`", ends)}
    assert not set(ours) - named
