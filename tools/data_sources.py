# SPDX-License-Identifier: Apache-2.0
"""The input of prepare_data.py: which files there are, and the documents in them.

A plain file is one document. A .jsonl file holds one document a line. Either may be compressed
(.gz, .xz, .bz2). Order and content depend on the files alone, so reading them twice gives the
same documents twice: once to train a tokenizer, once to tokenise.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_UNSUPPORTED = (".jsonl.zst", ".jsonl.zip", ".jsonl.lz4")
# What a damaged archive raises; gzip's and bz2's own errors are OSErrors without an errno.
_BROKEN_ARCHIVE = (EOFError, lzma.LZMAError, zlib.error)


class DataError(ValueError):
    """A fault in the input, the settings or the output that the user can mend."""


class _NotText(Exception):
    """The bytes of a file are no UTF-8 text."""


@dataclass(frozen=True)
class InputFile:
    """One file to read; `label` is its name within the input, `named` if the user named it."""

    path: Path
    label: str
    named: bool


def find_inputs(inputs: Iterable[str], exclude: Collection[Path]) -> list[InputFile]:
    """List the files of `--input`: in the order given, and sorted inside each directory.

    Hidden files and directories are left out, and so are the resolved paths in `exclude`.
    """
    files: list[InputFile] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files.extend(_walk(path, exclude))
        elif path.is_file():
            files.append(InputFile(path, path.name, named=True))
        elif path.exists():
            raise DataError(f"--input {name} is no regular file; write it to a file first")
        else:
            raise DataError(f"--input {name} does not exist; check the path")
    if not files:
        raise DataError(f"--input {' '.join(inputs)} holds no files; name files that hold text")
    for file in files:
        if file.path.name.lower().endswith(_UNSUPPORTED):
            raise DataError(
                f"--input {file.path}: this compression is not supported; use .jsonl, .jsonl.gz, "
                ".jsonl.xz or .jsonl.bz2"
            )
    return files


def stdlib_files() -> list[InputFile]:
    """List the Python files of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        file
        for file in _walk(root, exclude=())
        if file.path.suffix == ".py" and foreign.isdisjoint(Path(file.label).parts)
    ]
    if not files:
        raise DataError(f"--source stdlib: no .py files under {root}; use --input instead")
    return files


def _walk(root: Path, exclude: Collection[Path]) -> list[InputFile]:
    def fail(error: OSError) -> None:
        raise error

    found: list[InputFile] = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and path.resolve() not in exclude:
                found.append(InputFile(path, path.relative_to(root).as_posix(), named=False))
    return sorted(found, key=lambda file: file.label)


class Corpus:
    """The documents of a list of files.

    `not_text` and `empty` count what the last full pass over `documents` left out: files that
    are not UTF-8 text, and documents without a visible character.
    """

    def __init__(self, files: list[InputFile], json_key: str) -> None:
        self.files = files
        self.json_key = json_key
        self.not_text = 0
        self.empty = 0
        self._stamps: list[tuple[int, int]] = []

    def digest(self) -> str:
        """Hash the names and bytes of all files, and note their sizes and times."""
        total = hashlib.sha256()
        self._stamps = self._read_stamps()
        for file in self.files:
            with file.path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.label}\0{content}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def check_unchanged(self) -> None:
        """Raise if a file was written since `digest`, which then describes other data."""
        for file, before, now in zip(self.files, self._stamps, self._read_stamps(), strict=True):
            if before != now:
                raise DataError(f"{file.path} changed while it was read; run again")

    def _read_stamps(self) -> list[tuple[int, int]]:
        stats = [file.path.stat() for file in self.files]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def documents(self) -> Iterator[str]:
        """Yield every document that is not empty, in the order of the files."""
        self.not_text = self.empty = 0
        for file in self.files:
            try:
                for text in self._read(file):
                    if text and not text.isspace():
                        yield text
                    else:
                        self.empty += 1
            except _NotText as error:
                if file.named:
                    raise DataError(
                        f"--input {file.path} is not UTF-8 text ({error}); convert or leave it out"
                    ) from None
                self.not_text += 1

    def _read(self, file: InputFile) -> Iterator[str]:
        name = file.path.name.lower()
        opener = _OPENERS.get(file.path.suffix.lower(), open)
        is_jsonl = name.endswith((".jsonl", *(f".jsonl{suffix}" for suffix in _OPENERS)))
        try:
            with opener(file.path, "rb") as stream:
                if is_jsonl:
                    yield from self._read_jsonl(stream, file.path)
                else:
                    yield _decode(stream.read())
        except _BROKEN_ARCHIVE as error:
            raise DataError(f"{file.path} is damaged: {error}; fetch it again") from None
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror or error}") from None

    def _read_jsonl(self, stream: IO[bytes], path: Path) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[self.json_key]
                if not isinstance(text, str):
                    raise TypeError
                text.encode()
            except UnicodeError:
                fault = "the line is not valid Unicode; convert the file to UTF-8"
            except json.JSONDecodeError as error:
                fault = f"the line is not JSON ({error.msg}); each line must be one object"
            except (KeyError, TypeError):
                fault = f"no text under the key {self.json_key!r}; name the key with --json-key"
            else:
                yield text
                continue
            raise DataError(f"{path}, line {number}: {fault}")


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise _NotText("it holds NUL bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _NotText(f"byte {error.start}: {error.reason}") from None
