# SPDX-License-Identifier: Apache-2.0
"""Set before any test imports torch or Triton."""

import os
from pathlib import Path

# One thread a process, since many tests start several.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no GPU, kernels run in Triton's interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
