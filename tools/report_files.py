# SPDX-License-Identifier: Apache-2.0
"""Reading run reports."""

import json
from pathlib import Path
from typing import Any


class ReportError(ValueError):
    """A report that is missing or not what this tool reads."""


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a mapl_metrics.jsonl, without one that is not whole at its end.

    Raises:
        json.JSONDecodeError: another line is damaged.
    """
    lines = path.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
            break  # a run that goes on, or was killed, may be in the middle of its last line
    return entries
