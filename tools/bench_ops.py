# SPDX-License-Identifier: Apache-2.0
"""Checks, then times on a GPU what MAPL computes, beside the floor and other ways to do it.

    python tools/bench_ops.py [--quick] [--json FILE]

A stage's decoder and encoder first, then what makes payloads of latents (bench_wire.py) and the
projectors' step (bench_spel.py).

Floor: for each direction and pass, the larger of operations over the measured bf16 rate and bytes
(each input read once, each output written once) over the measured copy bandwidth. A stage's floor
is the sum of the four.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench_ops_variants import VARIANTS, Batch, Boundary, Shape
from gpu_timing import Ceilings, graph_time, measure_ceilings

TOKENS = 16384
GRID = [
    Shape(TOKENS, d, r, k, v)
    for v, d, r, k in itertools.product(
        (32000, 128256), (2048, 4096, 8192), (128, 256, 512), (256, 1024)
    )
]
QUICK = [Shape(TOKENS, 2048, 256, 256, 32000), Shape(TOKENS, 4096, 256, 1024, 32000)]

#: Sets of inputs that the calls of one timing rotate through.
_SETS = 3


def floors(shape: Shape, ceilings: Ceilings) -> tuple[float, float]:
    """Microseconds of the floor of a stage's forward passes, and of all four passes."""
    n, d, r, k, v = shape.n, shape.d, shape.r, shape.k, shape.v
    touched = v * (1 - (1 - 1 / v) ** n)  # rows of E, for ids that are uniform
    read = 2 * touched * k + 8 * n
    added = 2 * 4 * touched * k  # to the fp32 buffer of E's gradient
    wide, latent, gradient = 2 * n * d, 2 * n * r, 2 * 4 * d * r
    encode, decode = 2 * (d + k) * r, 2 * (r + k) * d  # weights
    forward = (
        ceilings.floor(2 * n * r * (d + k), wide + latent + read + encode),
        ceilings.floor(2 * n * d * (r + k), wide + latent + read + decode),
    )
    backward = (
        ceilings.floor(
            2 * n * r * (2 * d + 2 * k), 2 * wide + latent + read + added + encode + gradient
        ),
        ceilings.floor(
            2 * n * d * (2 * r + k), wide + 2 * latent + added + decode + gradient + 8 * n
        ),
    )
    return sum(forward), sum(forward) + sum(backward)


#: Sizes that are checked: multiples of the kernels' tiles, as the grid has, and not.
CHECKED = [
    Shape(1000, 520, 72, 96, 3000),
    *(Shape(512, 512, r, 256, 3000) for r in (128, 256, 512)),
]


def check(variant: str) -> float:
    """Largest relative error of all results against float64, over some sizes.

    Raises:
        AssertionError: one is off by more than bf16 explains.
    """
    worst = 0.0
    for shape in CHECKED:
        boundary, batch = Boundary(shape), Batch.random(shape)
        way = VARIANTS[variant](boundary, batch)
        out = way.step()
        way.once_a_step()
        assert batch.x.grad is not None and batch.z.grad is not None
        got = [*out, batch.z.grad, batch.x.grad, boundary.projector.grad, boundary.main_grad]
        for ours, exact in zip(got, _exact(boundary, batch), strict=True):
            error = float((ours.double() - exact).norm() / exact.norm())
            assert error < 1e-2, f"{variant} at {shape}: relative error {error:.1e}"
            worst = max(worst, error)
    return worst


def _exact(boundary: Boundary, batch: Batch) -> list[torch.Tensor]:
    """X̂, Z, dẐ, dX, dA and dE in float64."""
    leaves = [batch.z, batch.x, boundary.projector.A, boundary.anchor.E]
    z, x, a, table = (leaf.detach().double().requires_grad_() for leaf in leaves)
    anchor = table[batch.ids] @ boundary.anchor.basis.double()
    out = [z @ a.mT + anchor, (x - anchor) @ a]
    torch.autograd.backward(out, [batch.dx.double(), batch.dz.double()])
    gradients = [leaf.grad for leaf in (z, x, a, table)]
    return [tensor.detach() for tensor in (*out, *gradients) if tensor is not None]


def measure(shape: Shape, names: list[str]) -> dict[str, tuple[float, float]]:
    """Variant → microseconds of a stage's forward passes, and of all four passes."""
    boundary = Boundary(shape)
    batches = [Batch.random(shape) for _ in range(_SETS)]
    found = {}
    for name in names:
        variants = [VARIANTS[name](boundary, batch) for batch in batches]
        whole = graph_time([variant.step for variant in variants])
        with torch.no_grad():
            forward = graph_time([variant.forward for variant in variants])
        found[name] = forward, whole
        torch.compiler.reset()
    return found


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two points of the grid")
    parser.add_argument("--vocabulary", type=int, help="of the grid, this one alone")
    parser.add_argument("--stage-only", action="store_true", help="neither codecs nor SPEL")
    parser.add_argument("--json", type=Path, help="write all times here")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_ops.py needs a GPU and this machine has none")
    for variant in arguments.variants:
        print(f"{variant:<9} relative error {check(variant):.1e} against float64", flush=True)
    ceilings = measure_ceilings()
    print(
        f"{ceilings.device}: {ceilings.flops / 1e12:.0f} TFLOP/s bf16, "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s\nmicroseconds, forward + backward, encode + decode"
    )
    columns = " ".join(f"{name:>9}" for name in arguments.variants)
    print(
        f"{'':<32} {'floor':>6} {columns}   forward alone: floor, {', '.join(arguments.variants)}"
    )
    records = []
    for shape in QUICK if arguments.quick else GRID:
        if arguments.vocabulary not in (None, shape.v):
            continue
        floor = floors(shape, ceilings)
        times = measure(shape, arguments.variants)
        records.append({"shape": str(shape), "floor": floor, "times": times})
        whole = " ".join(f"{both:>9.0f}" for _, both in times.values())
        ahead = ", ".join(f"{forward:.0f}" for forward, _ in times.values())
        print(f"{shape!s:<32} {floor[1]:>6.0f} {whole}   {floor[0]:.0f}, {ahead}", flush=True)
    _summarise(records, arguments.variants)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"ceilings": vars(ceilings), "points": records}, indent=1)
        )
    if not arguments.stage_only:
        torch.cuda.empty_cache()
        for name in ("bench_wire.py", "bench_spel.py"):
            print(flush=True)
            subprocess.run([sys.executable, str(Path(__file__).with_name(name))], check=True)


def _summarise(records: list[dict[str, Any]], names: list[str]) -> None:
    """Prints the goals and what was reached, over all passes."""
    print("\ngeometric means over the grid, forward + backward")
    ours = [record["times"]["ours"][1] for record in records]
    ratios = [mine / record["floor"][1] for mine, record in zip(ours, records, strict=True)]
    print(f"  ours / floor     {_mean(ratios):.2f}   (goal ≤ 1.35; worst {max(ratios):.2f})")
    for name, goal in (("eager", 2.0), ("compiled", 1.2), ("by hand", 1.0)):
        if name in names:
            others = [record["times"][name][1] for record in records]
            faster = [other / mine for other, mine in zip(others, ours, strict=True)]
            said = f"{_mean(faster):.2f}   (goal ≥ {goal}; least {min(faster):.2f})"
            print(f"  {name:<9} / ours {said}")


if __name__ == "__main__":
    main()
