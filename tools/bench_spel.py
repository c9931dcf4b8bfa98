# SPDX-License-Identifier: Apache-2.0
"""The SPEL step of all boundaries of a rank: checked against float64, then timed, on a GPU.

    python tools/bench_spel.py                    # eight boundaries of 4096×256

Medians of one step, in ms (`tools/gpu_timing.py`): plain torch boundary by boundary, the same
compiled, and the kernels, each called and (where it can be captured) replayed from a CUDA graph. A
call includes the launches, which a training step hides where the host runs ahead of the device.

The floors are what each algorithm multiplies at rates that large GEMMs reach on this GPU, measured
in the same run: strict fp32, and a sixth of bf16's, for the kernels make an fp32 product of six.
`--profile` adds the time of each kernel.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_timing import call_time, gemm_rate, graph_time
from mapl.fp32 import full_precision
from mapl.spel import spel_step, step_all
from mapl.stiefel import orthonormality_error

RATE = 0.02
BETA = 0.9
#: Error of A against float64, relative, and |AᵀA − I|∞, above which nothing is timed.
HIGHEST_ERROR, HIGHEST_DISTANCE = 5e-6, 5e-6


@dataclass(frozen=True)
class Operands:
    """What is stepped: A, gradient and momentum of each boundary."""

    a: list[Tensor]
    grad: list[Tensor]
    momentum: list[Tensor]

    @classmethod
    def random(cls, boundaries: int, hidden: int, rank: int) -> "Operands":
        generator = torch.Generator("cuda").manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(hidden, rank, device="cuda", generator=generator)

        a = [torch.linalg.qr(normal()).Q.contiguous() for _ in range(boundaries)]
        return cls(a, [normal() for _ in a], [normal() / 10 for _ in a])


def exact_step(a: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
    """The new A in float64 with exact singular value decompositions."""

    def polar(x: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        sign: Tensor = u @ vh
        return sign

    a, grad, momentum = a.double(), grad.double(), momentum.double()
    inner = a.mT @ grad
    momentum = BETA * momentum + (1 - BETA) * (grad - a @ (inner + inner.mT) / 2)
    return polar(a - RATE * polar(momentum))


def check(operands: Operands) -> None:
    """Exits unless the kernels are as near to float64 as fp32 allows."""
    expected = [
        exact_step(*one) for one in zip(operands.a, operands.grad, operands.momentum, strict=True)
    ]
    plain = [
        spel_step(*one, RATE, BETA)[0]
        for one in zip(operands.a, operands.grad, operands.momentum, strict=True)
    ]
    step_all(operands.a, operands.grad, operands.momentum, RATE, BETA)
    for name, found in (("plain torch", plain), ("kernels", operands.a)):
        pairs = list(zip(found, expected, strict=True))
        error = max(float((x - exact).norm() / exact.norm()) for x, exact in pairs)
        distance = max(float(orthonormality_error(x.double())) for x in found)
        print(f"{name:<12} relative error of A {error:.1e}, max|AᵀA − I| {distance:.1e}")
        near = error < HIGHEST_ERROR and distance < HIGHEST_DISTANCE
        if name == "kernels" and not near:
            sys.exit("the kernels are too far from float64; nothing was timed")


def floating_point_operations(hidden: int, rank: int) -> tuple[float, float]:
    """Of one boundary's step: in plain torch, and as the kernels do it."""
    tall, square = 2.0 * hidden * rank**2, 2.0 * rank**3
    plain = 36 * tall + 16 * square
    # Three Gram matrices by half; square products: 4 k − 3 for k = 3 and 5 steps, 5 for the series.
    batched = 5 * tall + 3 * tall * (rank + 1) / (2 * rank) + (9 + 17 + 5) * square
    return plain, batched


@contextmanager
def reported() -> Iterator[None]:
    """Prints what fails and goes on: not everything can be compiled or captured."""
    try:
        yield
    except Exception as error:
        print(f"    failed: {type(error).__name__}: {str(error).splitlines()[0]}")


def print_profile(step: Callable[[], object], steps: int = 10) -> None:
    """µs of each kernel in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    print(f"\n{'kernel':<48} {'launches':>8} {'µs a step':>10}")
    kernels = [row for row in profile.key_averages() if row.device_time_total > 0]
    for row in sorted(kernels, key=lambda row: -row.device_time_total):
        print(
            f"{row.key[:48]:<48} {row.count / steps:>8.0f} {row.device_time_total / steps:>10.1f}"
        )


def main() -> None:
    """Checks, times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--boundaries", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="d")
    parser.add_argument("--rank", type=int, default=256, help="r")
    parser.add_argument("--repeats", type=int, default=50, help="calls that are timed")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_spel needs a GPU")
    size = arguments.boundaries, arguments.hidden, arguments.rank
    print(f"{torch.cuda.get_device_name()}: {size[0]} boundaries of {size[1]}×{size[2]}")
    check(Operands.random(*size))

    operands = Operands.random(*size)
    batch = list(zip(operands.a, operands.grad, operands.momentum, strict=True))
    compiled_step = torch.compile(spel_step)
    ways: dict[str, Callable[[], object]] = {
        "plain torch": lambda: [spel_step(*one, RATE, BETA) for one in batch],
        "torch.compile": lambda: [compiled_step(*one, RATE, BETA) for one in batch],
        "kernels": lambda: step_all(operands.a, operands.grad, operands.momentum, RATE, BETA),
    }
    print(f"\n{'way':<28} {'ms':>8}")
    for name, step in ways.items():
        with reported():
            print(f"{name:<28} {call_time([step], arguments.repeats) / 1e3:>8.3f}")
        with reported():
            print(f"{name + ', graph':<28} {graph_time([step]) / 1e3:>8.3f}")
    with full_precision(torch.device("cuda")):
        rates = gemm_rate(torch.float32), gemm_rate(torch.bfloat16) / 6
    names = "floor of plain torch", "floor of the kernels"
    counts = floating_point_operations(*size[1:])
    for name, operations, rate in zip(names, counts, rates, strict=True):
        total = size[0] * operations
        print(
            f"{name:<28} {1e3 * total / rate:>8.3f}   "
            f"{total / 1e9:.1f} GFLOP at {rate / 1e12:.0f} TFLOP/s"
        )
    if arguments.profile:
        print_profile(ways["kernels"])


if __name__ == "__main__":
    main()
