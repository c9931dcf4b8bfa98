# SPDX-License-Identifier: Apache-2.0
"""Replacing a name in somebody else's module: explicit, listed, and loud when it has moved."""

import inspect
from typing import Any

import torch

from megatron.mapl import versions


def replace(owner: Any, name: str, replacement: Any) -> None:
    """Sets `owner.name = replacement`.

    Raises:
        RuntimeError: `owner` has no such name, so the replacement would change nothing.
    """
    where = getattr(owner, "__qualname__", None) or owner.__name__
    if not hasattr(owner, name):
        raise RuntimeError(
            f"{where}.{name} is not there (torch {torch.__version__}): this version of MAPL "
            "replaces it; install the versions that requirements.lock names"
        )
    module, prefix = owner.__name__, ""
    if inspect.isclass(owner):
        module, prefix = owner.__module__, f"{owner.__qualname__}."
    listed = prefix + name in versions.SYMBOLS.get(module, ())
    # What is not listed would be missed only when it is replaced, after work has started.
    assert listed or not module.startswith(("megatron.core", "megatron.training")), (
        f"megatron.mapl.versions.SYMBOLS does not list {module}: {prefix}{name}"
    )
    setattr(owner, name, replacement)
