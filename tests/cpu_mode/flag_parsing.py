# SPDX-License-Identifier: Apache-2.0
"""The type of the fixture `parse`."""

from collections.abc import Callable, Sequence
from typing import Any

#: What flags come to: Megatron's namespace, and the boundaries' runtime or None.
Parse = Callable[[Sequence[str]], tuple[Any, Any]]
