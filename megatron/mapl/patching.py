# SPDX-License-Identifier: Apache-2.0
"""Replacing a name in somebody else's module: explicit, and loud when the name has moved."""

from typing import Any

import torch


def replace(owner: Any, name: str, replacement: Any) -> None:
    """Sets `owner.name = replacement`.

    Raises:
        RuntimeError: `owner` has no such name, so the replacement would change nothing.
    """
    if not hasattr(owner, name):
        where = getattr(owner, "__qualname__", None) or owner.__name__
        raise RuntimeError(
            f"{where}.{name} is not there (torch {torch.__version__}): this version of MAPL "
            "replaces it; install the versions that requirements.lock names"
        )
    setattr(owner, name, replacement)
