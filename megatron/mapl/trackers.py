# SPDX-License-Identifier: Apache-2.0
"""A line of metrics as Megatron shows it: TensorBoard, W&B, and its own kind of log line."""

from datetime import datetime
from typing import Any

from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

# What says which entry of a list it is, and is no figure.
_LABELS = ("boundary", "boundaries", "direction")


def write(line: dict[str, Any]) -> None:
    """To TensorBoard and W&B, on the rank where Megatron keeps its writers."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    named = scalars(line)
    if tensorboard:
        for name, value in named.items():
            tensorboard.add_scalar(name, value, line["iteration"])
    if wandb:
        wandb.log(named, line["iteration"])


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Name → value of all figures of a line of mapl_metrics.jsonl but its step and null ones."""
    named: dict[str, float | None] = {}

    def add(place: str, entry: dict[str, Any], separator: str = "/") -> None:
        for key, value in entry.items():
            if key not in _LABELS and not isinstance(value, list | dict):
                named[f"mapl/{place}{separator}{key.replace('_', '-')}"] = value

    add("", {key: value for key, value in line.items() if key != "iteration"}, "")
    add("sent", line["sent_by_kind"])
    add("seconds", line["seconds"])
    add("seconds/communication", line["seconds"]["communication"], "-")
    for entry in line["sent_by_boundary"]:
        add(f"boundary-{entry['boundary']}/sent", entry)
    for entry in line["codebooks"]:
        add(f"boundary-{entry['boundary']}/{entry['direction']}", entry, "-")
    for prefix, figures in (("", line), ("geometry/", line.get("geometry", {}))):
        for entry in figures.get("boundaries", []):
            add(f"{prefix}boundary-{entry['boundary']}", entry)
        for entry in figures.get("angles", []):
            add(f"{prefix}angle-{'-'.join(map(str, entry['boundaries']))}", entry)
    return {name: value for name, value in named.items() if value is not None}


def log_line(line: dict[str, Any], communication_ms: float | None) -> str:
    """The line of a log interval, to stand below Megatron's own.

    Args:
        line: of mapl_metrics.jsonl.
        communication_ms: in communication, milliseconds an iteration, mean over processes; None if
            no iteration after the first was timed.
    """
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    parts = [
        f" [{now}] iteration {line['iteration']:8d}/{get_args().train_iters:8d}",
        f"boundary traffic (MB): {line['sent_bytes'] / 1e6:.1f}",
    ]
    if line["ratio"] is not None:
        parts.append(f"traffic ratio: {line['ratio']:.2f}")
    if communication_ms is not None:
        parts.append(f"communication time per iteration (ms): {communication_ms:.1f}")
    energies = _values(line["boundaries"], "energy_kept")
    if energies:
        parts.append(f"energy kept: {sum(energies) / len(energies):.3f}")
    if line["boundaries"]:
        # Not "error: ", by which people and tools look for what went wrong.
        worst = max(_values(line["boundaries"], "orthonormality_error"))
        parts.append(f"orthonormal to: {worst:.1E}")
        skipped = sum(_values(line["boundaries"], "skipped_steps"))
        parts.append(f"number of skipped projector steps: {skipped:3d}")
    if line["codebooks"]:
        used = _values(line["codebooks"], "perplexity")
        parts.append(f"codebook perplexity: {sum(used) / len(used):.1f}")
        parts.append(f"dead codes: {max(_values(line['codebooks'], 'dead')):.1%}")
    return " | ".join(parts) + " |"


def _values(entries: list[dict[str, Any]], name: str) -> list[Any]:
    return [entry[name] for entry in entries if entry[name] is not None]
