# SPDX-License-Identifier: Apache-2.0
"""The files of one --output-prefix, published all together or not at all.

1. Everything is written under temporary names and brought to the disk.
2. The manifest is written as PREFIX.json.ready: from here on the run counts as done.
3. What it replaces is removed, an old manifest last; the new files get their names, each .idx
   (without which Megatron sees no dataset) after every .bin.
4. PREFIX.json.ready becomes PREFIX.json.

A run that was killed before step 2 leaves temporary files, which the next run removes. One killed
later left everything that steps 3 and 4 need, and both may be repeated: the next run ends them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_sources import DataError

_DATA = ("", "_train", "_valid")
_SUFFIXES = (
    ".model",
    *(f"{split}.bin" for split in _DATA),
    *(f"{split}.idx" for split in _DATA),
)

Manifest = dict[str, Any]


class OutputFiles:
    """The names under one prefix, and the way from temporary files to published ones."""

    def __init__(self, prefix: Path) -> None:
        if prefix.is_dir() or not prefix.name:
            raise DataError(f"--output-prefix {prefix} is a directory; add a name to it")
        self.prefix = prefix
        self._manifest = self.path(".json")
        self._ready = self.path(".json.ready")
        self._lock = self.path(".lock")

    def path(self, suffix: str) -> Path:
        """The published file with this suffix, such as "_train.bin"."""
        return self.prefix.with_name(self.prefix.name + suffix)

    def temporary(self, suffix: str) -> Path:
        """The name under which that file is written."""
        return self.path(suffix + ".tmp")

    def all_paths(self) -> set[Path]:
        """Every file that any run with this prefix may make, resolved: none of them is input."""
        files = [self.path(suffix) for suffix in _SUFFIXES]
        files += [self.temporary(suffix) for suffix in (*_SUFFIXES, ".json")]
        return {file.resolve() for file in (*files, self._manifest, self._ready, self._lock)}

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other runs out, finish or clear away a killed one, and leave nothing temporary."""
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"--output-prefix {self.prefix} is being written by another run; "
                    "wait for it or choose another prefix"
                ) from None
            except OSError:
                pass  # Some network file systems know no locks.
            try:
                if self._ready.exists():
                    self._publish()
                self._remove_temporaries()
                yield
            finally:
                if not self._ready.exists():
                    self._remove_temporaries()
                self._lock.unlink(missing_ok=True)

    def published(self) -> Manifest | None:
        """The manifest of a finished run, or None."""
        try:
            manifest: Manifest = json.loads(self._manifest.read_bytes())
            if set(manifest["files"]) <= set(_SUFFIXES) and manifest["settings"]:
                return manifest
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        raise DataError(f"{self._manifest} is no manifest of this tool; move it away")

    def damage(self, manifest: Manifest) -> str | None:
        """Say which file is not the one that the manifest tells of, or None if all are."""
        for suffix, expected in manifest["files"].items():
            path = self.path(suffix)
            if not path.is_file():
                return f"{path} is missing"
            if _describe(path) != expected:
                return f"{path} is not the file that {self._manifest} describes"
        return None

    def existing(self, suffixes: list[str]) -> list[Path]:
        """Those of the files with these suffixes that are there already."""
        return [self.path(suffix) for suffix in suffixes if self.path(suffix).exists()]

    def publish(self, manifest: Manifest, suffixes: list[str]) -> None:
        """Publish the temporary files with these suffixes and the manifest (steps 1 to 4)."""
        ordered = sorted(suffixes, key=_SUFFIXES.index)
        files = {suffix: _describe(self.temporary(suffix)) for suffix in ordered}
        for suffix in ordered:
            _sync(self.temporary(suffix))
        draft = self.temporary(".json")
        draft.write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
        _sync(draft)
        _sync(self.prefix.parent)
        os.replace(draft, self._ready)
        _sync(self.prefix.parent)
        self._publish()

    def _publish(self) -> None:
        suffixes = list(json.loads(self._ready.read_bytes())["files"])
        replaced = self.published()
        if replaced is not None:
            # A model stays: it may be the very --tokenizer-model of the run that replaces it.
            for suffix in replaced["files"]:
                if suffix != ".model":
                    self.path(suffix).unlink(missing_ok=True)
            self._manifest.unlink()
        waiting = [suffix for suffix in suffixes if self.temporary(suffix).exists()]
        for suffix in waiting:
            if suffix.endswith(".idx"):
                self.path(suffix).unlink(missing_ok=True)
        _sync(self.prefix.parent)
        for suffix in waiting:
            os.replace(self.temporary(suffix), self.path(suffix))
        _sync(self.prefix.parent)
        os.replace(self._ready, self._manifest)
        _sync(self.prefix.parent)

    def _remove_temporaries(self) -> None:
        for suffix in (*_SUFFIXES, ".json"):
            self.temporary(suffix).unlink(missing_ok=True)


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
