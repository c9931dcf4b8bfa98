# SPDX-License-Identifier: Apache-2.0
"""Draw the slow-network bench's results: step time, speed-up, loss against wall-clock time."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

import figures
from figures import save
from slow_network_plan import UNCOMPRESSED, settings
from slow_network_results import OF_RATIO, Results

# After the colours again, with another marker. Black is for what the others are compared with.
_COLOURS = figures.COLOURS[:-1]
_MARKERS = ("o", "s", "^")


def draw(results: Results, path: Path) -> None:
    """Three panels, written whole or not at all."""
    looks = _looks(results)

    def fill(figure: Any, panels: list[Any]) -> None:
        _draw_steps(panels[0], results, looks)
        _draw_speed_up(panels[1], results, looks)
        _draw_curves(panels[2], results, looks)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(9, len(labels)), frameon=False
        )

    save(path, 3, (18, 5.6), fill)


def _looks(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and marker of each setting that is drawn: those compared at all bandwidths."""
    few = {setting.name for setting in settings(results.sizes.hidden) if setting.few}
    measured = dict.fromkeys(t.setting for t in results.timings if t.link == "shaped")
    looks: dict[str, dict[str, Any]] = {UNCOMPRESSED: {"color": "#000000", "marker": "o"}}
    for index, name in enumerate(n for n in measured if n not in few and n != UNCOMPRESSED):
        marker = _MARKERS[index // len(_COLOURS) % len(_MARKERS)]
        looks[name] = {"color": _COLOURS[index % len(_COLOURS)], "marker": marker}
    return looks


def _draw_steps(axes: Any, results: Results, looks: dict[str, dict[str, Any]]) -> None:
    bandwidths = sorted(results.goodput)
    # "Unlimited" has its place to the right of the fastest link, apart from it.
    places = [*map(float, range(len(bandwidths))), len(bandwidths) - 1 + 1.4]
    for name, look in looks.items():
        steps = [results.step(name, mbit) for mbit in (*bandwidths, None)]
        limited = [(x, s) for x, s in zip(places[:-1], steps[:-1], strict=True) if s is not None]
        if limited:
            axes.plot(*zip(*limited, strict=True), **look, label=name, markersize=6, linewidth=1.5)
        if steps[-1] is not None:
            axes.plot(places[-1], steps[-1], **look, markersize=6)
    labels = [f"{mbit:g}" for mbit in bandwidths]
    axes.set_xticks(places, [*labels, "unlimited"])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(title="Time of a step", xlabel="bandwidth of a link (Mbit/s)", ylabel="seconds")
    axes.grid(axis="y", which="both", alpha=0.2)


def _draw_speed_up(axes: Any, results: Results, looks: dict[str, dict[str, Any]]) -> None:
    """A panel for all bandwidths: the slower the link, the larger the mark."""
    bandwidths = sorted(results.goodput)
    largest = 1.0
    for index, mbit in enumerate(bandwidths):
        size = 11 - 6 * index / max(1, len(bandwidths) - 1)
        for row in results.rows(mbit):
            if row.setting == UNCOMPRESSED or row.setting not in looks:
                continue
            if row.ratio is None or row.speed_up is None:
                continue
            axes.plot(row.ratio, row.speed_up, **looks[row.setting], markersize=size, alpha=0.8)
            largest = max(largest, row.ratio, row.speed_up)
        axes.plot([], [], "o", color="grey", markersize=size, label=f"{mbit:g} Mbit/s")
    ends = [0.8, largest * 1.15]
    axes.plot(ends, ends, color="grey", linewidth=1, label="as many times faster as fewer bytes")
    goal = [OF_RATIO * end for end in ends]
    axes.plot(ends, goal, color="grey", linewidth=1, linestyle="--", label=f"{OF_RATIO} × that")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set(title="Speed-up over uncompressed", xlabel="fewer bytes", ylabel="shorter steps")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.grid(alpha=0.2)


def _draw_curves(axes: Any, results: Results, looks: dict[str, dict[str, Any]]) -> None:
    for name in (name for name in looks if name in results.curves):
        seconds, losses = zip(*results.curves[name], strict=True)
        # Not smoothed: a mean over the last few steps would lag most where steps take longest.
        axes.plot(seconds, losses, **looks[name], markersize=3.5, linewidth=1.5)
    axes.set(
        title=f"Training loss at {results.curve_mbit:g} Mbit/s",
        xlabel="wall-clock seconds after the first step",
        ylabel="cross-entropy (nats per token)",
    )
    axes.grid(axis="y", alpha=0.25)
