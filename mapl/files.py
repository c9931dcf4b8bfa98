# SPDX-License-Identifier: Apache-2.0
"""The files of a run report, and writing files that are whole or not there."""

import os
from pathlib import Path

#: What a run with boundaries leaves in its report directory.
TRAFFIC_FILE = "mapl_traffic.json"
METRICS_FILE = "mapl_metrics.jsonl"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes beside `path` and moves into its place; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
