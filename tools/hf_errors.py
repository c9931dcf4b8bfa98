# SPDX-License-Identifier: Apache-2.0
"""What conversions raise, and JSON that is read with it."""

import json
from pathlib import Path
from typing import Any


class ConversionError(Exception):
    """A fault that the user can mend; one line."""


def first_line(error: Exception) -> str:
    """Of an error of a library, which may say more than fits."""
    return str(error).strip().partition("\n")[0]


def read_json(file: Path) -> dict[str, Any]:
    """What the file holds.

    Raises:
        ConversionError: it is no JSON object.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON: {error}; is it whole?") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{file} is no JSON object; is it the right file?")
    return found
