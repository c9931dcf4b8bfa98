# SPDX-License-Identifier: Apache-2.0
"""Two mends of Triton 3.6's interpreter, for tests on machines without a GPU.

- It multiplies the bit patterns of bf16 matrices; here they are widened to fp32 first.
- numpy 2.5 makes no int of the one-element arrays that stand for its scalars, so that no `range`
  took them.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replaces both functions, once."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "plain_dot"):
        return
    builder.plain_dot = builder.create_dot
    builder.create_dot = _dot
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
    return self.plain_dot(_widened(a), _widened(b), *more)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
