# SPDX-License-Identifier: Apache-2.0
"""Times of GPU work, with the host's part in them and without, and what a GPU can do at most."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Of the matrices whose product tells how fast a GPU multiplies.
_GEMM_SIZE = 8192
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
    once = _elapsed(graph.replay, 1)
    repeats = max(1, round(_LENGTH_MS / once))
    times = [_elapsed(graph.replay, repeats) / repeats for _ in range(rounds)]
    graph.reset()
    return statistics.median(times) / len(calls) * 1e3


def call_time(calls: Sequence[Callable[[], object]], repeats: int = 30) -> float:
    """Median microseconds of one of the calls, gaps between its launches included.

    They take turns; three that come first are not counted.
    """
    times = [_elapsed(calls[number % len(calls)], 1) for number in range(repeats + 3)]
    return statistics.median(times[3:]) * 1e3


def _elapsed(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of 8192 × 8192 matrices of random numbers, as precise as torch is set."""
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device="cuda").to(dtype) for _ in range(2))
    return 2 * _GEMM_SIZE**3 / graph_time([lambda: left @ right]) * 1e6


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was measured to do.

    Attributes:
        flops: bf16 operations a second, see `gemm_rate`.
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
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)])
    return Ceilings(
        torch.cuda.get_device_name(),
        gemm_rate(torch.bfloat16),
        2 * source.numel() / copy * 1e6,
    )
