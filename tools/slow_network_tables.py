# SPDX-License-Identifier: Apache-2.0
"""The slow-network bench's results as text: the same tables for the terminal and as Markdown."""

from collections.abc import Sequence

from slow_network_plan import UNCOMPRESSED
from slow_network_results import (
    AGREEMENT,
    OF_RATIO,
    WIRE_SHARE,
    Results,
    Row,
    agreement,
    hiding,
    wire_share,
)
from text_table import columns

# The share of the processors that nobody misses; the kernel's networking takes a part of it.
_QUIET = 0.1


def page(results: Results, *, markdown: bool) -> str:
    """Everything, under headings."""
    parts = [_preface(results)]
    for mbit in sorted(results.goodput):
        if rows := results.rows(mbit):
            parts += [_heading(_link_title(results, mbit), markdown), _table(rows, markdown)]
            parts.append(_verdict(results, mbit, rows))
    if hidden := hiding(results):
        names = ["setting", "Mbit/s", "without s", "with s", "faster by"]
        cells = [
            [name, _bandwidth(mbit), f"{off:.2f}", f"{on:.2f}", f"{off / on - 1:+.0%}"]
            for name, mbit, off, on in hidden
        ]
        parts.append(_heading("Latency hiding (receiving ahead)", markdown))
        parts.append(columns(names, cells, markdown=markdown))
    if agreed := agreement(results):
        names = ["setting", "Mbit/s", "shaped s", "emulated s", "difference"]
        cells = [
            [name, _bandwidth(mbit), f"{there:.2f}", f"{here:.2f}", f"{here / there - 1:+.1%}"]
            for name, mbit, there, here in agreed
        ]
        title = (
            "Links emulated, at the bandwidth for payload, against shaped links (goal: within "
            f"{AGREEMENT:.0%})"
        )
        parts += [_heading(title, markdown), columns(names, cells, markdown=markdown)]
    return "\n\n".join([*parts, *_caveats(results)])


def _preface(results: Results) -> str:
    sizes = results.sizes
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    return (
        f"{sizes.stages} stages, one host each; d = {sizes.hidden}, {sizes.micro_batches} "
        f"micro-batches of {sizes.micro_batch} × {sizes.sequence} tokens a step, bf16, gloo; "
        f"{machine}. Settings with boundaries receive ahead, but those named so; uncompressed "
        "Megatron waits for each transfer."
    )


def _caveats(results: Results) -> list[str]:
    disturbed = [
        f"{name} ({share:.0%})" for name, share in results.other_programs.items() if share > _QUIET
    ]
    caveats = [f"{name} failed: {why}" for name, why in results.failed.items()]
    if disturbed:
        caveats.append(
            "Other programs kept the processors busy meanwhile, and computation took longer than "
            f"it need: {', '.join(disturbed)}."
        )
    return caveats


def _table(rows: Sequence[Row], markdown: bool) -> str:
    names = [
        *("setting", "step s", "min–max s", "tokens/s", "sent MB", "B/token", "on links MB"),
        *("byte ratio", "speed-up", "of ratio", "compute", "wire floor s"),
    ]
    cells = [
        [
            row.setting,
            f"{row.step:.2f}",
            f"{row.fastest:.2f}–{row.slowest:.2f}",
            f"{row.tokens_per_second:,.0f}",
            _number(row.sent, "{:.2f}", 1e-6),
            _number(row.token_bytes, "{:.1f}"),
            _number(row.link_bytes, "{:.2f}", 1e-6),
            _number(row.ratio, "{:.2f}×"),
            _number(row.speed_up, "{:.2f}×"),
            _number(row.of_ratio, "{:.2f}"),
            _number(row.compute_share, "{:.0%}"),
            _number(row.floor, "{:.2f}"),
        ]
        for row in rows
    ]
    return columns(names, cells, markdown=markdown)


def _verdict(results: Results, mbit: float, rows: Sequence[Row]) -> str:
    """The goal for step times, and which settings meet it."""
    share = wire_share(results, mbit)
    if share is None:
        return "No uncompressed run to compare with."
    text = f"The uncompressed run spends {share:.0%} of its step on the wire"
    if share < WIRE_SHARE:
        return f"{text}, less than {WIRE_SHARE:.0%}: the goal for speed-up does not apply."
    compared = [row for row in rows if row.setting != UNCOMPRESSED and row.of_ratio is not None]
    kinds = {"meets": [], "is bound by computation": [], "misses": []}  # type: dict[str, list[str]]
    for row in compared:
        assert row.of_ratio is not None
        if row.of_ratio >= OF_RATIO:
            kinds["meets"].append(row.setting)
        elif row.compute_bound:
            kinds["is bound by computation"].append(row.setting)
        else:
            kinds["misses"].append(row.setting)
    found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return f"{text}. Goal, speed-up ≥ {OF_RATIO} × byte ratio: {found or 'nothing to compare'}."


def _link_title(results: Results, mbit: float) -> str:
    return (
        f"{_bandwidth(mbit)} Mbit/s in each direction of each link "
        f"({results.goodput[mbit]:.1f} Mbit/s of payload, both ways at once)"
    )


def _bandwidth(mbit: float | None) -> str:
    return "unlimited" if mbit is None else f"{mbit:g}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value * scale)


def _heading(title: str, markdown: bool) -> str:
    return f"## {title}" if markdown else f"{title}\n{'=' * len(title)}"
