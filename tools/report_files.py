# SPDX-License-Identifier: Apache-2.0
"""Reading run reports."""

import json
from pathlib import Path
from typing import Any

# Megatron's names of losses in TensorBoard.
_TRAINING, _VALIDATION = "lm loss", "lm loss validation"


class ReportError(ValueError):
    """A report that is missing or not what this tool reads."""


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a mapl_metrics.jsonl, without one that is not whole at its end.

    Raises:
        ReportError: another line is damaged.
    """
    lines = path.read_text(errors="replace").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise damaged_line(path, number, error) from None
            break  # a run that goes on, or was killed, may be in the middle of its last line
    return entries


def damaged_line(path: Path, number: int, error: Exception) -> ReportError:
    """What is to be said of a line, counted from 1, that no run has written."""
    return ReportError(
        f"{path}, line {number}, is no line of metrics ({error!r}); delete this line, and the step "
        "is left out"
    )


def event_losses(directory: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Training and validation losses by step, as Megatron wrote them to a --tensorboard-dir.

    Both are empty if the directory has no such events.
    """
    if not any(directory.glob("events.out.tfevents.*")):
        return [], []
    # Importing it takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    training, validation = (
        [(event.step, event.value) for event in events.Scalars(tag)] if tag in known else []
        for tag in (_TRAINING, _VALIDATION)
    )
    # At the end Megatron writes the test loss under the same name and step, after the other.
    return training, sorted(dict(reversed(validation)).items())
