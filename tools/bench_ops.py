# SPDX-License-Identifier: Apache-2.0
"""Checks, then times a boundary's encoder and decoder on a GPU, beside the floor and other ways.

    python tools/bench_ops.py [--quick] [--json FILE]

Floor: per direction and pass, the larger of operations over the measured bf16 rate and bytes (each
input read once, each output written once) over the measured copy bandwidth; that of forward and
backward together is the sum of both.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch

from bench_ops_variants import VARIANTS, Batch, Boundary, Shape, forward, step
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


def floors(shape: Shape, ceilings: Ceilings) -> dict[str, tuple[float, float]]:
    """Direction → microseconds of the floor of forward, and of forward and backward."""
    n, d, r, k, v = shape.n, shape.d, shape.r, shape.k, shape.v
    touched = v * (1 - (1 - 1 / v) ** n)  # rows of E, for ids that are uniform
    rows = touched * k * 2
    wide, latent, ids = 2 * n * d, 2 * n * r, 8 * n
    table_gradient = touched * k * 4 * 2  # read and written, fp32
    encode = (
        ceilings.floor(2 * n * r * (d + k), wide + latent + ids + rows + 2 * (d + k) * r),
        ceilings.floor(
            2 * n * r * (2 * d + 2 * k) + 2 * k * d * r,
            2 * wide + latent + ids + rows + table_gradient + 2 * (d + k) * r + 4 * d * r,
        ),
    )
    decode = (
        ceilings.floor(2 * n * d * (r + k), wide + latent + ids + rows + 2 * (r + k) * d),
        ceilings.floor(
            2 * n * d * (2 * r + k),
            wide + 2 * latent + ids + table_gradient + 2 * (r + k) * d + 4 * d * r,
        ),
    )
    return {"encode": (encode[0], sum(encode)), "decode": (decode[0], sum(decode))}


def check(variant: str) -> float:
    """Largest relative error of all results against float64.

    Raises:
        AssertionError: one is off by more than bf16 explains.
    """
    shape = Shape(1000, 520, 72, 96, 3000)
    worst = 0.0
    for direction in ("encode", "decode"):
        boundary, batch = Boundary(shape), Batch.random(shape)
        result = step(variant, direction, boundary, batch)()
        start = batch.x if direction == "encode" else batch.z
        assert start.grad is not None
        ours = [result, start.grad, boundary.projector.grad, boundary.main_grad]
        for got, exact in zip(ours, _exact(direction, boundary, batch), strict=True):
            error = float((got.double() - exact).norm() / exact.norm())
            assert error < 1e-2, f"{variant} {direction}: relative error {error:.1e}"
            worst = max(worst, error)
    return worst


def _exact(direction: str, boundary: Boundary, batch: Batch) -> list[torch.Tensor]:
    """The same in float64: result and gradients of the start, A and E."""
    a = boundary.projector.A.detach().double().requires_grad_()
    table = boundary.anchor.E.detach().double().requires_grad_()
    anchor = table[batch.ids] @ boundary.anchor.basis.double()
    start = (batch.x if direction == "encode" else batch.z).detach().double().requires_grad_()
    out = (start - anchor) @ a if direction == "encode" else start @ a.mT + anchor
    out.backward((batch.dz if direction == "encode" else batch.dx).double())
    assert start.grad is not None and a.grad is not None and table.grad is not None
    return [out.detach(), start.grad, a.grad, table.grad]


def measure(shape: Shape, variants: list[str]) -> dict[str, dict[str, float]]:
    """Variant → microseconds of each direction's forward, and of its forward and backward."""
    boundary = Boundary(shape)
    batches = [Batch.random(shape) for _ in range(_SETS)]
    found: dict[str, dict[str, float]] = {}
    for variant in variants:
        times = found[variant] = {}
        for direction in ("encode", "decode"):
            forwards = [forward(variant, direction, boundary, batch) for batch in batches]
            times[f"{direction} forward"] = graph_time(forwards)
            steps = [step(variant, direction, boundary, batch) for batch in batches]
            times[f"{direction} both"] = graph_time(steps)
        torch.compiler.reset()
    return found


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two points of the grid")
    parser.add_argument("--json", type=Path, help="write all times here")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
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
        floor = floors(shape, ceilings)
        times = measure(shape, arguments.variants)
        records.append({"shape": str(shape), "floor": floor, "times": times})
        total = {name: t["encode both"] + t["decode both"] for name, t in times.items()}
        ahead = {name: t["encode forward"] + t["decode forward"] for name, t in times.items()}
        print(
            f"{shape!s:<32} {floor['encode'][1] + floor['decode'][1]:>6.0f} "
            + " ".join(f"{total[name]:>9.0f}" for name in arguments.variants)
            + f"   {floor['encode'][0] + floor['decode'][0]:.0f}, "
            + ", ".join(f"{ahead[name]:.0f}" for name in arguments.variants),
            flush=True,
        )
    _summarise(records, arguments.variants)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"ceilings": vars(ceilings), "points": records}, indent=1)
        )


def _summarise(records: list[dict], variants: list[str]) -> None:  # type: ignore[type-arg]
    def total(record: dict, name: str) -> float:  # type: ignore[type-arg]
        return float(sum(record["times"][name][f"{way} both"] for way in ("encode", "decode")))

    print("\ngeometric means over the grid, forward + backward")
    floor = [r["floor"]["encode"][1] + r["floor"]["decode"][1] for r in records]
    ours = [total(record, "ours") for record in records]
    ratios = [mine / least for mine, least in zip(ours, floor, strict=True)]
    print(f"  ours / floor     {_mean(ratios):.2f}   (goal ≤ 1.35; worst {max(ratios):.2f})")
    goals = {"eager": 2.0, "compiled": 1.2, "by hand": 1.0}
    for name, goal in goals.items():
        if name in variants:
            faster = [total(r, name) / mine for r, mine in zip(records, ours, strict=True)]
            said = f"{_mean(faster):.2f}   (goal ≥ {goal}; least {min(faster):.2f})"
            print(f"  {name:<9} / ours {said}")


if __name__ == "__main__":
    main()
