# SPDX-License-Identifier: Apache-2.0
"""What one process of a MAPL job holds beside Megatron's own state."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from mapl.config import MaplConfig
from mapl.payload_guard import PayloadGuard
from mapl.plan import BoundaryPlan
from mapl.traffic import Ledger

if TYPE_CHECKING:
    from mapl.projectors import Projector
    from megatron.mapl.model import StageBoundaries
    from megatron.mapl.port import Port
    from megatron.mapl.subspace import Subspace
    from megatron.mapl.transfers import InFlight
    from megatron.mapl.transport import Transport


@dataclass
class MaplRuntime:
    """Built once from the flags (job_runtime.py) and handed to everything that hooks into Megatron.

    Attributes:
        config: the flags.
        plan: the ranks of the boundaries.
        vocab_size: tokens of the padded vocabulary.
        pipeline_size: P, stages that are processes.
        pipeline_dtype: the dtype of activations between stages.
        split_ranks: how many tensor-parallel ranks share the sending of a micro-batch.
        seed: Megatron's `--seed`.
        timeout_after_first_step: seconds, `--distributed-timeout-seconds-after-init` over gloo.
        stages: the model chunks of this process, in order, once the model is built.
        ledger, guard: bytes sent, payloads checked.
        transport: what takes the place of `torch.distributed` between stages, if anything does.
        in_flight: transfers that go on while a stage computes, during a schedule that has them.
        subspace: what holds the model's weights in the span of a fixed projector, if anything does.
        communication_seconds: host time in exchanges and in waiting for them, since the first step.
        first_step_ended: when, on the clock of `time.perf_counter`; None before.
        steps, tokens: of this run.
    """

    config: MaplConfig
    plan: BoundaryPlan
    vocab_size: int
    pipeline_size: int
    pipeline_dtype: torch.dtype
    split_ranks: int
    seed: int
    timeout_after_first_step: int | None = None
    stages: list["StageBoundaries"] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    guard: PayloadGuard = field(default_factory=PayloadGuard)
    transport: "Transport | None" = None
    in_flight: "InFlight | None" = None
    subspace: "Subspace | None" = None
    communication_seconds: float = 0.0
    first_step_ended: float | None = None
    steps: int = 0
    tokens: int = 0

    @property
    def training_seconds(self) -> float:
        """Wall-clock time since the first step until now, evaluations and saves included.

        It spans what `communication_seconds` does, whenever both are read.
        """
        if self.first_step_ended is None:
            return 0.0
        return time.perf_counter() - self.first_step_ended

    @property
    def timeout(self) -> timedelta | None:
        """Of a transfer between stages; None for that of the process group.

        Megatron's shorter one after the first step does not reach gloo's transfers by itself.
        """
        if self.timeout_after_first_step is None or self.steps == 0:
            return None
        return timedelta(seconds=self.timeout_after_first_step)

    def inlets(self) -> list["Port"]:
        """The receiving ends of boundaries in this process, in pipeline order."""
        return [stage.inlet for stage in self.stages if stage.inlet is not None]

    def outlets(self) -> list["Port"]:
        """The sending ends of boundaries in this process, in pipeline order."""
        return [stage.outlet for stage in self.stages if stage.outlet is not None]

    def ports(self) -> list["Port"]:
        """Both, ordered by boundary; the order is the same on both sides of every link."""
        return sorted(self.inlets() + self.outlets(), key=lambda port: port.boundary)

    def projectors(self) -> list["Projector"]:
        """The projectors in this process, ordered by boundary."""
        return [port.projector for port in self.ports() if port.projector is not None]

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Books the time inside as communication."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.communication_seconds += time.perf_counter() - start
