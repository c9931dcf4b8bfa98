# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for Hopper, on any machine, and tables what each takes of it."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import mapl.ops.kernels
from mapl.ops.ahead_of_time import Specialisation, compile_for


def specialisations() -> Iterator[Specialisation]:
    """Those that the modules of `mapl.ops.kernels` list."""
    for module in pkgutil.iter_modules(mapl.ops.kernels.__path__, "mapl.ops.kernels."):
        yield from getattr(importlib.import_module(module.name), "SPECIALISATIONS", ())


def main() -> None:
    """Prints the table; fails where a kernel does not compile or spills registers."""
    print(f"{'kernel':<28} {'constants':<58} {'registers':>9} {'spilled B':>9} {'shared B':>9}")
    spilling = 0
    for item in specialisations():
        found = compile_for(item)
        settings = {**item.constants, **item.options}
        said = " ".join(f"{name}={value}" for name, value in settings.items())
        numbers = f"{found.registers:>9} {found.spilled:>9} {found.shared:>9}"
        print(f"{found.name:<28} {said:<58} {numbers}", flush=True)
        spilling += found.spilled > 0
    if spilling:
        sys.exit(f"{spilling} kernels spill registers")


if __name__ == "__main__":
    main()
