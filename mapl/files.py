# SPDX-License-Identifier: Apache-2.0
"""Writing files that are whole or not there."""

import os
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes beside `path` and moves into its place; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
