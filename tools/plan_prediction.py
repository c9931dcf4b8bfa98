# SPDX-License-Identifier: Apache-2.0
"""How long a training step of a planned job takes with a setting, and what holds it up."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from mapl.plan import BoundaryPlan, payloads_ahead, plan_boundaries
from pipeline_simulation import BACK, ONWARD, Course, simulate
from pipeline_step import Boundary, Chunk, Direction, Link, Step
from plan_job import Job
from plan_settings import Setting
from plan_traffic import boundaries, plain_boundaries

#: Gains that differ by less than this part of a step are alike.
_ALIKE = 1e-3

_simulated = lru_cache(maxsize=None)(simulate)


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
        return _simulated(self.step)

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
        unlimited = _simulated(_with_links(self.step, bandwidth=float("inf"), latency=0.0)).seconds
        return floor, unlimited - floor, max(0.0, self.seconds - unlimited)

    @cached_property
    def bottleneck(self) -> str:
        """What would shorten the step most if it were twice as fast."""
        faster = {
            "computation": _twice_as_fast(self.step),
            "bandwidth": _with_links(self.step, bandwidth=2.0),
            "latency": _with_links(self.step, latency=0.5),
        }
        seconds = {name: _simulated(step).seconds for name, step in faster.items()}
        least = min(seconds.values())
        name = next(n for n, s in seconds.items() if s <= least + _ALIKE * self.seconds)
        return {
            "computation": self._computation, "bandwidth": self._bandwidth, "latency": self._latency
        }[name]()  # fmt: skip

    def _computation(self) -> str:
        step = self.step
        each = [step.computing(process) for process in range(step.processes)]
        if step.devices is not None or min(each) > 0.98 * max(each):
            return "computation"
        return f"computation of stage {each.index(max(each))}"

    def _bandwidth(self) -> str:
        busy = self.course.busy
        largest = max(busy.values())
        used = f"{largest / self.seconds:.0%} in use"
        widest = [key for key, seconds in busy.items() if seconds > 0.98 * largest]
        if len(widest) > 1 and len(widest) >= len(self.step.links):
            return f"bandwidth of the links, {used}"
        return f"bandwidth from {self._ends(*widest[0])}, {used}"

    def _latency(self) -> str:
        latencies = {
            (number, name): side.latency
            for number, link in enumerate(self.step.links)
            for name, side in ((ONWARD, link.onward), (BACK, link.back))
        }
        largest = max(latencies.values())
        widest = [key for key, latency in latencies.items() if latency > 0.98 * largest]
        if len(widest) == len(latencies):
            return "latency of the links"
        return f"latency from {self._ends(*widest[0])}"

    def _ends(self, link: int, direction: str) -> str:
        one, other = link, (link + 1) % self.step.processes
        return f"stage {one} to {other}" if direction == ONWARD else f"stage {other} to {one}"


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
    links = (Link(fast, fast),) * link_count(job)
    return predict(job, setting, Machine(1.0, links, devices)).seconds


def link_count(job: Job) -> int:
    """Links that a job uses; with virtual stages also that from the last process to the first."""
    processes = job.pipeline_model_parallel_size
    return processes if job.num_virtual_stages_per_pipeline_rank > 1 else processes - 1


def with_bandwidth(machine: Machine, factor: float) -> Machine:
    """A machine whose links all have `factor` times the bandwidth."""
    return replace(machine, links=tuple(_scaled(link, factor, 1.0) for link in machine.links))


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


def _with_links(step: Step, *, bandwidth: float = 1.0, latency: float = 1.0) -> Step:
    return replace(step, links=tuple(_scaled(link, bandwidth, latency) for link in step.links))


def _scaled(link: Link, bandwidth: float, latency: float) -> Link:
    def side(direction: Direction) -> Direction:
        return Direction(direction.bits_a_second * bandwidth, direction.latency * latency)

    return Link(side(link.onward), side(link.back))


def _twice_as_fast(step: Step) -> Step:
    chunks = tuple(Chunk(chunk.forward / 2, chunk.backward / 2) for chunk in step.chunks)
    return replace(step, chunks=chunks)
