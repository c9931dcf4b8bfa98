# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for Hopper without spilling registers; needs no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_kernels_compile_for_hopper():
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(ROOT), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, str(ROOT / "tools" / "compile_ops.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    table = {line.split()[0] for line in run.stdout.splitlines() if line.strip()}
    for path in (ROOT / "mapl" / "ops" / "kernels").glob("*.py"):
        missing = launched(path.read_text()) - table
        assert not missing, f"{path.name} launches what is not compiled here: {missing}"


def launched(source: str) -> set[str]:
    """The kernels that a module launches, itself or by handing them to `_launch`."""
    kernels = set(re.findall(r"@triton\.jit(?:\(.*?\))?\ndef (\w+)\(", source))
    used = set(re.findall(r"\b(\w+)\[", source)) | set(re.findall(r"_launch\((\w+)", source))
    return kernels & used
