# SPDX-License-Identifier: Apache-2.0
"""`--mapl-geometry-interval`: what `mapl.geometry` measures, of a job that trains.

Figures are taken where activations are sent, from the first micro-batch of a step; a process
measures the tokens that it holds. For the angles, rank 0 takes in one copy of every projector.
Angles of distant boundaries need both matrices in one place, whatever one does, and sending each
once, to one process, is the least: d·r numbers of fp32 a boundary.
"""

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args

from mapl import geometry
from mapl.coordinates import Coordinates
from mapl.geometry import Angles, Geometry
from megatron.mapl.runtime import MaplRuntime


def current_step() -> int:
    """Number of the optimizer step that is being trained, from 1: Megatron's iteration."""
    return int(get_args().curr_iteration) + 1


def training_step() -> int | None:
    """The same during a forward pass; None in an evaluation, which has no gradients."""
    return current_step() if torch.is_grad_enabled() else None


class Probe:
    """Measures at one boundary's sending end, one micro-batch each so many steps.

    Args:
        interval: steps between two measurements.

    Attributes:
        measured: the last figures, or None before there are any.
        step: that they were taken in.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self.measured: Geometry | None = None
        self.step = 0

    def observe(
        self,
        x: torch.Tensor,
        coordinates: Coordinates | None,
        basis: torch.Tensor | None,
        a: torch.Tensor,
    ) -> None:
        """Measures the first micro-batch of a step that is due; see `geometry.measure`."""
        step = training_step()
        if step is not None and step % self._interval == 0 and step != self.step:
            self.measured, self.step = geometry.measure(x, coordinates, basis, a), step


def collect(runtime: MaplRuntime, step: int) -> dict[str, Any]:
    """What a line of metrics says of a step that was measured; to be called on every process.

    Args:
        step: its number, a multiple of the interval.

    Returns:
        On every process, `boundaries`: the figures of each, means over all who measured it (data
        and tensor parallel ranks), and `angles`: those between all pairs of boundaries, after the
        step.
    """
    measured = {}
    for stage in runtime.stages:
        if stage.outlet is not None and stage.probe is not None:
            assert stage.probe.step == step, (stage.probe.step, step)
            measured[stage.outlet.boundary] = stage.probe.measured
    holds = {port.boundary for port in runtime.ports() if port.projector is not None}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (measured, holds))
    figures: dict[int, list[Geometry]] = {}
    for own, _ in everyone:
        for boundary, figure in own.items():
            figures.setdefault(boundary, []).append(figure)
    holders = {b: next(r for r, (_, has) in enumerate(everyone) if b in has) for b in figures}
    return {
        "boundaries": [
            {"boundary": boundary, **asdict(geometry.mean(figures[boundary]))}
            for boundary in sorted(figures)
        ],
        "angles": [asdict(angles) for angles in _angles(runtime, holders)],
    }


def _angles(runtime: MaplRuntime, holders: dict[int, int]) -> list[Angles]:
    """Between all pairs of boundaries; rank 0 computes them and tells the others.

    Args:
        holders: boundary → the first process that has its projector.
    """
    projectors = _projectors_on_rank_0(runtime, holders)
    found = [geometry.angles_between(projectors) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _projectors_on_rank_0(runtime: MaplRuntime, holders: dict[int, int]) -> dict[int, torch.Tensor]:
    """Boundary → A: on rank 0 of all boundaries, elsewhere of this process's."""
    on_host = dist.get_backend() == "gloo"  # which cannot send what lies on a GPU
    device = torch.device("cpu" if on_host else torch.cuda.current_device())
    held = {
        port.boundary: port.projector.A.detach().to(device)
        for port in runtime.ports()
        if port.projector is not None
    }
    rank = dist.get_rank()
    for boundary, holder in sorted(holders.items()):  # in one order on both sides
        if holder == 0:
            continue
        if rank == holder:
            dist.send(held[boundary], 0)
        elif rank == 0:
            shape = runtime.plan.hidden_size, runtime.plan.ranks[boundary]
            held[boundary] = torch.empty(shape, dtype=torch.float32, device=device)
            dist.recv(held[boundary], holder)
    return held
