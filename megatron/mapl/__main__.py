# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron.mapl SCRIPT ARGS…`: a script for Megatron-LM, unchanged, with boundaries.

The script runs as `python SCRIPT ARGS…` would run it: as `__main__`, with its own name and
arguments in `sys.argv`, and its directory first in the module search path.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron.mapl import session

USAGE = "usage: python -m megatron.mapl SCRIPT ARGS…  (or torchrun -m megatron.mapl SCRIPT ARGS…)"


def main(arguments: list[str]) -> None:
    """Runs the script that the first argument names; the others are the script's."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\nSCRIPT takes Megatron's flags and --mapl-*; SCRIPT --help lists them.")
        sys.exit(0 if arguments else 2)
    script = Path(arguments[0])
    if arguments[0].startswith("-") or not script.is_file():
        print(USAGE, file=sys.stderr)
        sys.exit(f"megatron.mapl: error: {arguments[0]} is no file; name the training script first")
    sys.argv[:] = arguments
    if not sys.flags.safe_path:  # else python puts neither directory in
        sys.path[0] = str(script.resolve().parent)  # in place of what `python -m` put in
    if find_spec("mapl") is None:  # found there alone: not installed
        sys.path.append(str(Path(__file__).parents[2]))
    session.run(lambda: runpy.run_path(str(script), run_name="__main__"))


if __name__ == "__main__":
    main(sys.argv[1:])
