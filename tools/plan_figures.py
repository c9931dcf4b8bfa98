# SPDX-License-Identifier: Apache-2.0
"""The picture of a plan: what a step consists of, and the speed at other bandwidths."""

from pathlib import Path
from typing import Any

from figures import COLOURS, save
from plan_prediction import Prediction, predict, with_bandwidth
from plan_report import Plan

_PARTS = ("computation", "the pipeline's own bubble", "waiting for the network")

#: Bandwidths of the curves, as multiples of the planned one.
_FACTORS = tuple(2.0**power for power in range(-4, 9))


def draw(plan: Plan, path: Path) -> None:
    """Writes the picture as PNG, whole or not at all."""

    def panels(figure: Any, axes: list[Any]) -> None:
        _draw_steps(axes[0], plan)
        _draw_curves(axes[1], plan)

    save(path, 2, (13.0, 5.5), panels)


def _shown(plan: Plan) -> list[tuple[str, Prediction]]:
    shown = [(p.setting.name, p) for p in plan.shown]
    if plan.recommendation.measured is not None:
        shown.append(("recommended", plan.recommendation.prediction))
    return shown


def _with_curves(plan: Plan) -> list[tuple[str, Prediction]]:
    """Uncompressed, those without a measured gap, the fastest, and what is recommended."""
    return [
        (name, p)
        for name, p in _shown(plan)
        if not p.setting.flags or p.setting.gap is None or p is plan.shown[-1]
        or name == "recommended"
    ]  # fmt: skip


def _draw_steps(axes: Any, plan: Plan) -> None:
    shown = _shown(plan)
    places = range(len(shown))
    left = [0.0] * len(shown)
    for part, name in enumerate(_PARTS):
        widths = [prediction.shares[part] for _, prediction in shown]
        axes.barh(places, widths, left=left, color=COLOURS[part], label=name)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.annotate(f" {end:.3g} s", (end, place), va="center", fontsize=9)
    axes.set_yticks(places, [name for name, _ in shown])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="Time of a step", xlabel="seconds")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_curves(axes: Any, plan: Plan) -> None:
    slowest = min(
        min(link.onward.bits_a_second, link.back.bits_a_second) for link in plan.machine.links
    )
    for colour, (name, prediction) in zip(COLOURS, _with_curves(plan), strict=False):
        speeds = [
            predict(
                plan.job, prediction.setting, with_bandwidth(plan.machine, factor)
            ).tokens_per_second
            for factor in _FACTORS
        ]
        bandwidths = [slowest * factor / 1e6 for factor in _FACTORS]
        style = {"linewidth": 2.5, "linestyle": "--"} if name == "recommended" else {}
        axes.plot(bandwidths, speeds, color=colour, label=name, **style)
    axes.axvline(slowest / 1e6, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set(
        title="Speed at other bandwidths",
        xlabel="bandwidth of the slowest link (Mbit/s); the line is yours",
        ylabel="tokens a second",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.2)
