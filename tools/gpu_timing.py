# SPDX-License-Identifier: Apache-2.0
"""Times of GPU work without the host's part in them, and what the GPU at hand can do at most."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Milliseconds that the replays of one timing take together, at least.
_LENGTH_MS = 20


def graph_time(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Median microseconds of one of the calls, which do the same work on inputs of their own.

    They are captured into one CUDA graph, so that gaps between launches do not count, and follow
    each other, so that none finds its inputs in the cache.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _elapsed(graph, 1)
    repeats = max(1, round(_LENGTH_MS / once))
    times = [_elapsed(graph, repeats) / repeats for _ in range(rounds)]
    graph.reset()
    return statistics.median(times) / len(calls) * 1e3


def _elapsed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was measured to do.

    Attributes:
        flops: bf16 operations a second, of a product of 8192 × 8192 matrices of random numbers.
        bandwidth: bytes a second, read and written, of a copy of 2 GiB.
    """

    device: str
    flops: float
    bandwidth: float

    def floor(self, flops: float, bytes_moved: float) -> float:
        """Microseconds that no implementation goes below."""
        return max(flops / self.flops, bytes_moved / self.bandwidth) * 1e6


def measure_ceilings() -> Ceilings:
    """Takes about a second and 6 GiB."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = graph_time([lambda: left @ right])
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)])
    return Ceilings(
        torch.cuda.get_device_name(),
        2 * size**3 / product * 1e6,
        2 * source.numel() / copy * 1e6,
    )
