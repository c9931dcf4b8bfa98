# SPDX-License-Identifier: Apache-2.0
"""How plans write numbers and sentences."""

import textwrap

_WIDTH = 100


def wrapped(text: str, indent: str = "") -> str:
    """A text in lines of up to 100 characters, of which all but the first are indented."""
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent or "  ")


def digits(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.3g}" if number < 100 else f"{number:,.0f}"
