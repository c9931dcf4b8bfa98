# SPDX-License-Identifier: Apache-2.0
"""Draws what bench_ops.py --json wrote: each way's time over the floor.

python tools/bench_ops_plot.py ops.json docs/kernels.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKS = {"ours": "o", "by hand": "s", "compiled": "^", "eager": "v"}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("times", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    report = json.loads(arguments.times.read_text())
    points = report["points"]
    figure, axes = plt.subplots(figsize=(12, 7), layout="constrained")
    for name, mark in MARKS.items():
        if name in points[0]["times"]:
            ratios = [point["times"][name][1] / point["floor"][1] for point in points]
            axes.plot(ratios, mark, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(1.35, color="grey", linewidth=0.8, linestyle="--", label="goal for ours, 1.35")
    axes.set_xticks(range(len(points)), [p["shape"] for p in points], rotation=60, ha="right")
    axes.set_ylabel("time / floor")
    axes.set_ylim(bottom=0)
    device = report["ceilings"]["device"]
    axes.set_title(f"A stage's decoder and encoder, forward and backward, 16384 tokens, {device}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
