# SPDX-License-Identifier: Apache-2.0
"""What a line of mapl_metrics.jsonl says: first each process of its own part, then of the whole."""

import math
from typing import Any

import torch

from mapl import traffic
from mapl.boundary import principal_angles
from mapl.codecs import ResidualVQCodec
from mapl.stiefel import orthonormality_error
from megatron.mapl.runtime import MaplRuntime


def counted(runtime: MaplRuntime) -> dict[str, Any]:
    """What this process has sent, and for how long it has trained and communicated."""
    return {
        "sent": runtime.ledger.sent,
        "training": runtime.training_seconds,
        # Before the end of a first step, as in a job that only evaluates, there is neither.
        "communication": runtime.communication_seconds if runtime.steps else 0.0,
    }


def seconds(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """After the first step, from what all processes have counted."""
    communication = [own["communication"] for own in everyone]
    return {
        "after_first_step": max(own["training"] for own in everyone),
        "communication": {
            "mean": sum(communication) / len(communication),
            "max": max(communication),
        },
    }


def describe(stage: Any) -> dict[str, Any]:
    """What one chunk knows: its outlet's boundary, and the angle between its two projectors."""
    outlet, inlet = stage.outlet, stage.inlet
    description: dict[str, Any] = {"boundary": None, "angle": None, "codebooks": _codebooks(stage)}
    if outlet is None or outlet.projector is None:
        return description
    projector = outlet.projector
    description["boundary"] = {
        "boundary": outlet.boundary,
        "energy_kept": None if stage.energy is None else float(stage.energy),
        "orthonormality_error": float(orthonormality_error(projector.A)),
        "gradient_norm": _finite(projector.grad.norm()) if projector.learns else None,
        "skipped_steps": int(projector.skipped_steps) if projector.learns else 0,
    }
    if inlet is not None and inlet.projector is not None:
        angles = principal_angles(inlet.projector.A, projector.A)
        description["angle"] = {
            "boundaries": [inlet.boundary, outlet.boundary],
            "mean_degrees": float(angles.mean()),
            "smallest_degrees": float(angles.min()),
        }
    return description


def _codebooks(stage: Any) -> list[dict[str, Any]]:
    """How the codebooks that this chunk encodes with are used."""
    return [
        {"boundary": port.boundary, "direction": direction, **codec.usage()}
        for port in (stage.inlet, stage.outlet)
        if port is not None
        for direction, codec in (("forward", port.forward_codec), ("backward", port.backward_codec))
        if isinstance(codec, ResidualVQCodec) and codec.sends
    ]


def _finite(value: torch.Tensor) -> float | None:
    """None for what JSON has no number for: the gradient of a step that was skipped."""
    number = float(value)
    return number if math.isfinite(number) else None


def combine(iteration: int, tokens: int, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of metrics from what all processes know.

    Replicas of a boundary agree but for the energy, which is a mean over their micro-batches.
    `tokens` count from the start of training, bytes from the start of this run.
    """
    losses = [own["loss"] for own in everyone if own["loss"] is not None]
    stages = [stage for own in everyone for stage in own["stages"]]
    boundaries = {s["boundary"]["boundary"]: s["boundary"] for s in stages if s["boundary"]}
    for number, entry in boundaries.items():
        energies = [
            s["boundary"]["energy_kept"]
            for s in stages
            if s["boundary"] and s["boundary"]["boundary"] == number
        ]
        if None not in energies:
            entry["energy_kept"] = sum(energies) / len(energies)
    angles = {tuple(s["angle"]["boundaries"]): s["angle"] for s in stages if s["angle"]}
    codebooks = {
        (entry["boundary"], entry["direction"]): entry for s in stages for entry in s["codebooks"]
    }
    sent = traffic.report(own["sent"] for own in everyone)
    return {
        "iteration": iteration,
        "tokens": tokens,
        "loss": sum(losses) / len(losses) if losses else None,
        "sent_bytes": sent["total"]["sent"],
        "uncompressed_bytes": sent["total"]["uncompressed"],
        "ratio": sent["total"]["ratio"] if sent["total"]["sent"] else None,
        "sent_by_kind": {kind: sent["total"][kind] for kind in traffic.KINDS},
        "sent_by_boundary": [_by_direction(entry) for entry in sent["boundaries"]],
        "seconds": seconds(everyone),
        "boundaries": [boundaries[b] for b in sorted(boundaries)],
        "angles": [angles[b] for b in sorted(angles)],
        "codebooks": [codebooks[place] for place in sorted(codebooks)],
    }


def _by_direction(entry: dict[str, Any]) -> dict[str, int]:
    """The bytes of one boundary; whole codebooks count to the direction that they are for."""
    sums = dict.fromkeys(("forward", "backward", "projector"), 0)
    for direction, kinds in entry.items():
        if isinstance(kinds, dict):
            sums[direction.removesuffix("_codebook")] += sum(kinds[k] for k in traffic.KINDS)
    return {"boundary": entry["boundary"], **sums, "uncompressed": entry["uncompressed"]}
