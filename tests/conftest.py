# SPDX-License-Identifier: Apache-2.0
"""Set before any test imports torch: one thread a process, since many tests start several."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
