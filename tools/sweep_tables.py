# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep as text, for the terminal and as Markdown."""

from collections.abc import Sequence

from sweep_results import Row, means
from text_table import columns

_NAMES = (
    *("run", "seed", "tokens", "validation loss", "gap", "forward B", "backward B"),
    *("once a step B", "ratio", "time s", "tokens/s", "state"),
)
_LONGEST = 100  # characters of a crash's reason; failure.json has all

_LEGEND = (
    "Validation loss: of the evaluation at the end, nats a token. Gap: to the uncompressed run of "
    "as many tokens and the same seed; none where that has not finished. B: bytes a token of "
    "training, mean over the boundaries; once a step: projectors and whole codebooks, both ways, "
    "spread over the step's tokens. Ratio: uncompressed bytes over all bytes that crossed, both of "
    "both directions. Evaluations are left out of the traffic, and of the time, which is that of "
    "the steps; tokens/s: at the median step."
)


def page(rows: Sequence[Row], *, markdown: bool) -> str:
    """All runs, then the means over seeds where there are several, and what to know of them."""
    parts = [_table(rows, markdown)]
    if several := [row for row in means(rows) if row.seed is None]:
        title = "Means over seeds (± half the range)"
        parts += [f"## {title}" if markdown else f"{title}:", _table(several, markdown)]
    return "\n\n".join([*parts, *_caveats(rows), _LEGEND])


def _table(rows: Sequence[Row], markdown: bool) -> str:
    cells = [_cells(row) for row in rows]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    return columns(_NAMES, cells, markdown=markdown)


def _cells(row: Row) -> list[str]:
    t = row.traffic
    sizes = (None,) * 3 if t is None else (t.forward, t.backward, t.once_a_step)
    state = row.state if len(row.state) <= _LONGEST else row.state[: _LONGEST - 1] + "…"
    return [
        row.setting,
        "mean" if row.seed is None else str(row.seed),
        f"{row.tokens:,}",
        _spread(_number(row.loss, ".4f"), row.loss_spread, ".4f"),
        _spread(_number(row.gap, "+.2f", "%"), row.gap_spread, ".2f"),
        *(_number(size, ",.1f") for size in sizes),
        _number(row.ratio if row.loss is not None else None, ".2f", "×"),
        _number(row.seconds, ",.0f"),
        _number(row.tokens_per_second, ",.0f"),
        state,
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _spread(text: str, spread: float | None, form: str) -> str:
    return text if spread is None else f"{text} ± {spread:{form}}"


def _caveats(rows: Sequence[Row]) -> list[str]:
    caveats = []
    if len({row.tokens for row in rows}) > 1:
        caveats.append(
            "Runs of different lengths: compare losses of the same number of tokens alone."
        )
    partly = [
        f"{row.setting} ({row.traffic.tokens:,} of {row.tokens:,} tokens)"
        for row in rows
        if row.traffic is not None and row.traffic.tokens != row.tokens
    ]
    if partly:
        caveats.append(
            "A process was killed before it wrote its traffic report, so that bytes are of a part "
            f"of the run: {', '.join(partly)}."
        )
    return caveats
