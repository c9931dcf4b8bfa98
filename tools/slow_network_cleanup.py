# SPDX-License-Identifier: Apache-2.0
"""Take network namespaces down: when their owner leaves, is killed, or has been gone for long.

A namespace is named `slow-network-PID-START-…` after the process that made it. `START` is when that
process started, in clock ticks since the boot, so that a later process of the same number is not
taken for it.

Run as a script it is the watchdog: it waits until its standard input closes, which happens however
the process at the other end ends, and then removes the namespaces named on its command line.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# For killed processes to end. The namespace's name goes in any case.
_PATIENCE = 10.0

_NAME = re.compile(r"slow-network-(\d+)-(\d+)-.+")


def own_prefix() -> str:
    """What the names of this process's namespaces begin with."""
    return f"slow-network-{os.getpid()}-{_start_of(os.getpid())}-"


def leftovers() -> list[str]:
    """The namespaces of owners that no longer run."""
    found = ((name, _NAME.fullmatch(name)) for name in _namespaces())
    return [name for name, owner in found if owner and _start_of(int(owner[1])) != int(owner[2])]


def remove(names: list[str]) -> None:
    """Kill what runs in the namespaces and remove them, if they are there."""
    quiet = 0
    end = time.monotonic() + _PATIENCE
    # Twice in a row, for a process that was about to enter when its owner was killed.
    while quiet < 2 and time.monotonic() < end:
        pids = [pid for name in names for pid in _processes(name)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if pids else quiet + 1
        time.sleep(0.1)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def remove_prefixed(prefix: str) -> None:
    """The same for all namespaces whose names begin with `prefix`."""
    remove([name for name in _namespaces() if name.startswith(prefix)])


class Watchdog:
    """A process that removes this process's namespaces, after `close` or when this one dies."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        # A session of its own: what ends this process's group or terminal must not end it too.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, prefix], stdin=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        """Returns when the namespaces are gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():  # somebody has killed it
            remove_prefixed(self._prefix)


def _namespaces() -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listing.stdout.splitlines() if line.strip()]


def _processes(name: str) -> list[int]:
    listing = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(pid) for pid in listing.stdout.split()]


def _start_of(pid: int) -> int | None:
    """Clock ticks from the boot to the start of a process; None if there is none."""
    try:
        # The second field is the program's name, in brackets, with whatever is in it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def main() -> None:
    """Watch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    remove_prefixed(sys.argv[1])


if __name__ == "__main__":
    main()
