# SPDX-License-Identifier: Apache-2.0
"""How long a training step of a planned job takes with a setting, and what holds it up."""

from dataclasses import dataclass, replace
from functools import cached_property

from mapl.plan import BoundaryPlan, payloads_ahead, plan_boundaries
from pipeline_simulation import Course, simulated
from pipeline_step import Boundary, Chunk, Direction, Link, Step
from plan_bottleneck import bottleneck
from plan_job import Job
from plan_settings import Setting
from plan_traffic import boundaries, plain_boundaries


@dataclass(frozen=True)
class Machine:
    """What a job runs on.

    Attributes:
        flops: floating-point operations a second of one device, sustained.
        links: between consecutive processes, see `Step`.
        devices: groups of tensor-parallel devices that the processes share; None for one each.
    """

    flops: float
    links: tuple[Link, ...]
    devices: float | None = None


@dataclass(frozen=True)
class Prediction:
    """A step with one setting.

    Attributes:
        plan: ranks and codecs of its boundaries; None for plain Megatron.
        sent, uncompressed: bytes of a step over all links, both directions; what plain Megatron
            sends.
    """

    job: Job
    setting: Setting
    step: Step
    plan: BoundaryPlan | None
    sent: float
    uncompressed: float

    @cached_property
    def course(self) -> Course:
        """How the step goes."""
        return simulated(self.step)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.course.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of one replica."""
        return self.job.step_tokens / self.seconds

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over all bytes that cross, both of both directions."""
        return self.uncompressed / self.sent

    @cached_property
    def shares(self) -> tuple[float, float, float]:
        """Seconds: computation at the least, the pipeline's own bubble, waiting for the network."""
        floor = self.step.compute_floor
        unlimited = simulated(self.step.with_links(bandwidth=float("inf"), latency=0.0)).seconds
        return floor, unlimited - floor, max(0.0, self.seconds - unlimited)

    @cached_property
    def bottleneck(self) -> str:
        """What would shorten the step most if it were twice as fast."""
        return bottleneck(self.step)


def predict(job: Job, setting: Setting, machine: Machine) -> Prediction:
    """Puts a job's step together.

    Raises:
        ValueError: the setting does not fit the job; names the flag, its value and the remedy.
    """
    config = setting.config
    plain = plain_boundaries(job)
    plan, sent, ahead = None, plain, 0
    virtual = job.num_virtual_stages_per_pipeline_rank > 1
    if config is not None:
        plan = plan_boundaries(
            config, hidden_size=job.hidden_size, boundaries=job.boundaries, shards=_shards(job)
        )
        sent = boundaries(job, config, plan)
        ahead = payloads_ahead(config, backend=job.distributed_backend, virtual=virtual)
    step = Step(
        processes=job.pipeline_model_parallel_size,
        chunks=_chunks(job, plan, machine.flops, setting),
        boundaries=sent,
        links=machine.links,
        micro_batches=job.micro_batches,
        receive_ahead=ahead,
        devices=machine.devices,
        backend=job.distributed_backend,
    )
    return Prediction(
        job, setting, step, plan, _step_bytes(job, sent), _step_bytes(job, plain)
    )  # fmt: skip


def unlimited_seconds(job: Job, setting: Setting, devices: float | None) -> float:
    """Of a step with devices of 1 FLOP/s and links that cost nothing; s/F with F FLOP/s."""
    fast = Direction(float("inf"), 0.0)
    links = (Link(fast, fast),) * job.links
    return predict(job, setting, Machine(1.0, links, devices)).seconds


def with_bandwidth(machine: Machine, factor: float) -> Machine:
    """A machine whose links all have `factor` times the bandwidth."""
    return replace(machine, links=tuple(link.scaled(factor, 1.0) for link in machine.links))


def _shards(job: Job) -> int:
    split = not job.sequence_parallel and not job.seq_length % job.tensor_model_parallel_size
    return job.tensor_model_parallel_size if split else 1


def _step_bytes(job: Job, each: tuple[Boundary, ...]) -> float:
    return sum(
        job.micro_batches * (b.forward + b.backward) + b.step_onward + b.step_back for b in each
    )


def _chunks(
    job: Job, plan: BoundaryPlan | None, flops: float, setting: Setting
) -> tuple[Chunk, ...]:
    """What each chunk of the model computes, the products of its boundaries included."""
    speed = flops * job.tensor_model_parallel_size
    chunks = []
    for number in range(job.chunks):
        forward, backward = job.chunk_flops(number)
        if plan is not None:
            for boundary in {number - 1, number} & {*range(job.boundaries)}:
                products = _projection_flops(plan, boundary, setting, sends=boundary == number)
                forward += job.micro_batch_tokens * products
                backward += job.micro_batch_tokens * 2 * products
        chunks.append(Chunk(forward / speed, backward / speed))
    return tuple(chunks)


def _projection_flops(plan: BoundaryPlan, boundary: int, setting: Setting, *, sends: bool) -> float:
    """Of one side of a boundary for a token, forward: 2 d r and what an anchor of rank r_a adds.

    The sender forms X A − C (P A), the receiver [Z | C] [Aᵀ; P]: 2 r_a r and 2 r_a d more. Backward
    they form as many products for the gradients of what came in, and as many for A and the anchor.
    """
    config = setting.config
    assert config is not None, "plain Megatron has no boundaries"
    rank, width = plan.ranks[boundary], plan.hidden_size
    if not rank or config.projector == "none":
        return 0.0
    anchor = plan.anchor_rank if config.anchor in ("factorized", "bigram") else 0
    return 2.0 * width * rank + 2.0 * anchor * (rank if sends else width)
