# SPDX-License-Identifier: Apache-2.0
"""The command line of prepare_data.py, named as Megatron names things."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cli import Parser, positive
from data_sources import DataError
from data_tokenizer import HUGGINGFACE, SENTENCEPIECE

# Raised when the same input and settings come to give other files.
FORMAT = 1

# What a Hugging Face tokenizer consists of; a directory may hold a model's weights as well.
_TOKENIZER_FILES = {".json", ".txt", ".model", ".tiktoken", ".jinja"}


@dataclass(frozen=True)
class Arguments:
    """The validated command line; `tokenizer_model` is None where one is to be trained."""

    input: list[str]
    source: str | None
    json_key: str
    output_prefix: Path
    valid_fraction: Fraction
    overwrite: bool
    tokenizer_type: str
    tokenizer_model: Path | None
    vocab_size: int
    append_eod: bool
    workers: int

    @property
    def trains(self) -> bool:
        return self.tokenizer_model is None

    @property
    def splits(self) -> tuple[str, ...]:
        """What comes between the prefix and .bin, the training part first."""
        return ("_train", "_valid") if self.valid_fraction else ("",)

    def settings(self) -> dict[str, Any]:
        """All that the files depend on, apart from the input."""
        settings = {
            "format": FORMAT,
            "json_key": self.json_key,
            "valid_fraction": str(self.valid_fraction),
            "append_eod": self.append_eod,
            "tokenizer_type": self.tokenizer_type,
        }
        if self.tokenizer_model is None:
            return {**settings, "vocab_size": self.vocab_size}
        return {**settings, "tokenizer_sha256": _digest(self.tokenizer_model)}


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> Arguments:
    """Parse and validate; a fault is one line on stderr and exit code 2."""
    parser = _build_parser(description)
    options = parser.parse_args(argv)
    if options.source and options.json_key:
        parser.error(f"--json-key {options.json_key}: --source stdlib has no JSON; leave it out")
    if options.tokenizer_model is None and options.tokenizer_type != SENTENCEPIECE:
        parser.error(
            f"--tokenizer-type {options.tokenizer_type} cannot be trained here; "
            "name its directory with --tokenizer-model"
        )
    if options.tokenizer_model is not None and options.vocab_size:
        parser.error(
            f"--vocab-size {options.vocab_size} is for a tokenizer trained here; "
            "leave it out, or --tokenizer-model"
        )
    arguments = vars(options)
    arguments["input"] = options.input or []
    arguments["json_key"] = options.json_key or "text"
    arguments["vocab_size"] = options.vocab_size or 8192
    return Arguments(**arguments)


def _build_parser(description: str | None) -> Parser:
    parser = Parser("prepare_data.py", description)
    where = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, and directories with all files in them but hidden ones; a .jsonl file holds "
        "one document a line, any other file is one document; .gz, .xz and .bz2 are unpacked",
    )
    where.add_argument(
        "--source", choices=["stdlib"], help="the source code of Python's standard library"
    )
    parser.add_argument("--json-key", help="key of the text in a .jsonl line (default: text)")

    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        choices=[SENTENCEPIECE, HUGGINGFACE],
        default=SENTENCEPIECE,
        help="default: %(default)s",
    )
    group.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="PATH",
        help="an existing SentencePiece model file or Hugging Face directory (default: train a "
        "SentencePiece BPE model on the input and write it to PREFIX.model)",
    )
    group.add_argument(
        "--vocab-size", type=positive, help="pieces of the model to train (default: 8192)"
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the token that Megatron takes for its end (default: yes)",
    )

    _add_output_flags(parser)
    return parser


def _add_output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix", type=Path, required=True, metavar="PREFIX", help="PREFIX.bin, .idx, ..."
    )
    group.add_argument(
        "--valid-fraction",
        type=_fraction,
        default=Fraction(0),
        metavar="F",
        help="put this part of the documents into PREFIX_valid and the others into PREFIX_train",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made with other settings"
    )
    group.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        help="processes that tokenise (default: one a core)",
    )


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number between 0 and 1, such as 0.05")
    return value


def _digest(model: Path) -> str:
    if model.is_dir():
        files = sorted(path for path in model.iterdir() if path.suffix in _TOKENIZER_FILES)
    elif model.is_file():
        files = [model]
    else:
        raise DataError(f"--tokenizer-model {model} does not exist; check the path")
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() if model.is_dir() else b"")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
