# SPDX-License-Identifier: Apache-2.0
"""What the command lines of tools have in common: one line and exit code 2 for a user's fault."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Faults without the usage; descriptions as they are written; whole flags alone."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """A flag's `type`: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def run(
    prog: str,
    work: Callable[[], None],
    *,
    faults: type[Exception],
    output: str,
    interrupted: str,
) -> int:
    """Does the work of a tool.

    Args:
        prog: the tool's name, with which its messages begin.
        work: what it does.
        faults: what `work` raises where the user can mend it.
        output: flag and value to be named where the system's error names no file.
        interrupted: what is to be said after Ctrl-C.

    Returns:
        The exit code: 0, 2 after a fault, 130 after Ctrl-C.
    """
    try:
        work()
    except faults as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{prog}: error: {error.filename or output}: {error.strerror or error}; "
            "check the path, its permissions and the free space",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0
