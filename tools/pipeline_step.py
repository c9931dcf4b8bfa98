# SPDX-License-Identifier: Apache-2.0
"""What one training step of a pipeline consists of: computation, payloads, links."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chunk:
    """The part of a model between two boundaries: seconds for one micro-batch on a device alone."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Boundary:
    """Bytes that cross one boundary: of a micro-batch, and once a step in each direction."""

    forward: float
    backward: float
    step_onward: float = 0.0
    step_back: float = 0.0


@dataclass(frozen=True)
class Direction:
    """One direction of a link: bits a second (inf: no limit), and seconds one way."""

    bits_a_second: float
    latency: float


@dataclass(frozen=True)
class Link:
    """Between a process and the next one: towards the next, and back."""

    onward: Direction
    back: Direction

    def scaled(self, bandwidth: float, latency: float) -> "Link":
        """The same with multiples of its bandwidths and its latencies."""

        def side(one: Direction) -> Direction:
            return Direction(one.bits_a_second * bandwidth, one.latency * latency)

        return Link(side(self.onward), side(self.back))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step consists of.

    Attributes:
        chunks: of the model, in order; chunk c is on process c modulo `processes`.
        boundaries: between consecutive chunks.
        links: between consecutive processes; with virtual stages a last one, from the last process
            to the first, but of two processes, which have one.
        micro_batches: m.
        receive_ahead: payloads of each direction received and sent ahead, without virtual stages;
            0 waits for each where it stands.
        devices: that the processes share evenly; None for one each.
        backend: of torch.distributed, "gloo" or "nccl".
    """

    processes: int
    chunks: tuple[Chunk, ...]
    boundaries: tuple[Boundary, ...]
    links: tuple[Link, ...]
    micro_batches: int
    receive_ahead: int = 0
    devices: float | None = None
    backend: str = "gloo"

    @property
    def virtual_stages(self) -> int:
        """Chunks of the model in each process."""
        return len(self.chunks) // self.processes

    def computing(self, process: int) -> float:
        """Seconds that one process computes for on a device alone."""
        own = self.chunks[process :: self.processes]
        return self.micro_batches * sum(chunk.forward + chunk.backward for chunk in own)

    @property
    def compute_floor(self) -> float:
        """Seconds that the step's computation takes at the least."""
        each = [self.computing(process) for process in range(self.processes)]
        return max(*each, sum(each) / (self.devices or self.processes))

    def with_links(self, *, bandwidth: float = 1.0, latency: float = 1.0) -> "Step":
        """The same over links with multiples of their bandwidths and their latencies."""
        return replace(self, links=tuple(link.scaled(bandwidth, latency) for link in self.links))

    def twice_as_fast(self) -> "Step":
        """The same with devices of twice the speed."""
        chunks = tuple(Chunk(chunk.forward / 2, chunk.backward / 2) for chunk in self.chunks)
        return replace(self, chunks=chunks)
