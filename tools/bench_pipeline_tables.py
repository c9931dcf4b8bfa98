# SPDX-License-Identifier: Apache-2.0
"""What the pipeline bench prints of its report."""

import statistics
from itertools import pairwise
from typing import Any

from bench_pipeline_plan import LAYOUTS, PLAIN, UNPROJECTED, Model, formula

_GIB = 2**30


def page(report: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = [_heading(report), _speed(report), _memory(report)]
    return "\n\n".join(parts + [table for table in (_waits(report), _kernels(report)) if table])


def steps_of(report: dict[str, Any], setting: str) -> list[float]:
    """Seconds of the steps that count, of all rounds, as the last stage saw them."""
    seconds = []
    for training in _good(report, setting):
        times = training["ranks"][-1]["times"]
        steps = [after - before for before, after in pairwise(times)]
        seconds += steps[report["warm_up"] :]
    return seconds


def _good(report: dict[str, Any], setting: str) -> list[dict[str, Any]]:
    return [t for t in report["trainings"] if t["setting"] == setting and "error" not in t]


def _names(report: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(training["setting"] for training in report["trainings"])
    return [name for name in names if _good(report, name)]


def _heading(report: dict[str, Any]) -> str:
    model, peak = report["model"], report["peak"]
    device = next((t["ranks"][0]["device"] for t in report["trainings"] if "ranks" in t), "?")
    return (
        f"{report['layout']} on {report['gpus']} × {device}, torch {report['torch']}: "
        f"{report['parameters'] / 1e9:.3f}·10⁹ parameters, {model['layers']} layers, "
        f"d={model['hidden']}, s={model['sequence']}, {model['micro_batches']} micro-batches of "
        f"{model['micro_batch']}, r={model['rank']}, {report['flops_a_token'] / 1e9:.2f} GFLOP a "
        f"token; peak {'?' if peak is None else f'{peak / 1e12:.0f}'} TFLOP/s measured, "
        f"{report['datasheet'] / 1e12:.0f} by the data sheet"
    )


def _speed(report: dict[str, Any]) -> str:
    plain = steps_of(report, PLAIN)
    rows = [
        "| setting | step, ms | tokens/s | MFU of measured peak | of the data sheet | "
        "speed to plain | fewer bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in _names(report):
        step = statistics.median(steps_of(report, name))
        tokens = report["tokens"] / step
        rate = tokens * report["flops_a_token"] / report["gpus"]
        peak, ratio = report["peak"], _good(report, name)[-1].get("ratio")
        against = f"{statistics.median(plain) / step:.4f}" if plain else "–"
        rows.append(
            f"| {name} | {step * 1e3:.1f} | {tokens:,.0f} | "
            f"{'–' if peak is None else f'{rate / peak:.1%}'} | {rate / report['datasheet']:.1%} | "
            f"{against} | {'–' if ratio is None else f'{ratio:.2f}×'} |"
        )
    return "\n".join(rows)


def _memory(report: dict[str, Any]) -> str:
    peaks = {name: _peaks(report, name) for name in _names(report)}
    plain = peaks.get(PLAIN)
    rows = [
        "| setting | GiB at most, by rank | more than plain, MiB, by rank | by the formula, MiB |",
        "|---|---|---|---|",
    ]
    for name, values in peaks.items():
        gib = ", ".join(f"{value / _GIB:.2f}" for value in values)
        more = "–"
        if plain is not None and name != PLAIN:
            more = ", ".join(
                f"{(value - base) / 2**20:+.0f}" for value, base in zip(values, plain, strict=True)
            )
        model, layout = Model(**report["model"]), LAYOUTS[report["layout"]]
        said = "–"
        if name not in (PLAIN, UNPROJECTED):
            sizes = [formula(model, layout, rank, name) for rank in range(len(values))]
            said = ", ".join(f"{size / 2**20:.0f}" for size in sizes)
        rows.append(f"| {name} | {gib} | {more} | {said} |")
    return "\n".join(rows)


def _peaks(report: dict[str, Any], setting: str) -> list[int]:
    trainings = _good(report, setting)
    return [
        max(t["ranks"][rank]["max_memory"] for t in trainings)
        for rank in range(len(trainings[0]["ranks"]))
    ]


def _profiles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting → summary of the process that was profiled."""
    found = {}
    for name in _names(report):
        for rank in _good(report, name)[-1]["ranks"]:
            if "profile" in rank:
                found[name] = rank["profile"]
    return found


def _waits(report: dict[str, Any]) -> str:
    profiles = _profiles(report)
    if not profiles:
        return ""
    rows = [
        "| setting | host waits in a step, one process | a micro-batch | waited, ms | step, ms | "
        "device busy, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, summary in profiles.items():
        waits = summary["waits"]
        each = ", ".join(f"{count} {call}" for call, count in sorted(waits.items())) or "0"
        calls = sum(count for call, count in waits.items() if call.startswith("cuda"))
        rows.append(
            f"| {name} | {each} | {calls / report['model']['micro_batches']:.1f} | "
            f"{summary['waited_ms']:.1f} | {summary['step_ms']:.1f} | {summary['busy_ms']:.1f} |"
        )
    return "\n".join(rows)


def _kernels(report: dict[str, Any]) -> str:
    lines = []
    for name, summary in _profiles(report).items():
        lines.append(f"{name}: what the device did for one process, ms")
        for kernel, length in list(summary["kernels"].items())[:12]:
            lines.append(f"  {length:9.2f}  {kernel}")
    return "\n".join(lines)
