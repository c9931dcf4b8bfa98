# SPDX-License-Identifier: Apache-2.0
"""Runs tests/cpu_mode, whose modules put torch into CPU mode, in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_what_needs_megatron_in_cpu_mode() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/cpu_mode"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])
