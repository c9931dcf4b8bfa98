# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that runs for every token: plain torch, and the same as Triton kernels.

Each operation has a reference in plain torch, which runs anywhere and defines the truth, and on
GPUs a kernel. `use_triton` decides which of the two a call takes; MAPL_OPS forces it.
"""

from mapl.ops.dispatch import use_triton

__all__ = ["use_triton"]
