# SPDX-License-Identifier: Apache-2.0
"""Tables of text, aligned for the terminal or as Markdown."""

from collections.abc import Sequence


def columns(names: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [names, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    if markdown:
        rule = [rule[0], *(dashes[:-1] + ":" for dashes in rule[1:])]
    text = []
    for line in (names, rule, *rows):
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    return "\n".join(text)
