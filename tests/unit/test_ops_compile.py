# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for Hopper without spilling registers; needs no GPU."""

import os
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
    modules = {p.stem for p in (ROOT / "mapl" / "ops" / "kernels").glob("*.py")} - {"__init__"}
    for module in modules:
        source = (ROOT / "mapl" / "ops" / "kernels" / f"{module}.py").read_text()
        for line in source.splitlines():
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                assert line.split("(")[0].removeprefix("def ") in run.stdout, "not in the table"
