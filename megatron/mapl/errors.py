# SPDX-License-Identifier: Apache-2.0
"""How bad input is reported: one clear line in place of a traceback from each process."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

#: How long to look for torchrun's store; it was there when this process started.
_STORE_SECONDS = 10


def program() -> str:
    """The name of the script that runs, for messages."""
    return Path(sys.argv[0]).name


def exit_with_error(error: Exception) -> NoReturn:
    """Prints the message once for the job and ends this process with status 2."""
    if _is_first_to_report():
        print(f"{program()}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def exit_without_peer(lost: str) -> NoReturn:
    """Says on this process that another one is gone or silent, and ends it with status 1.

    Every process says so: each knows another part, and the store may have gone with the peer.
    """
    print(
        f"{program()}: error: {lost}; start the job again from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(1)  # in order it would wait for transfers that never end


def _is_first_to_report() -> bool:
    """Whether to print: most errors are seen by all processes, but some by one alone.

    Whoever asks torchrun's store first reports. Where there is none, the first process of each node
    does.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS)))
        return bool(store.add("mapl/error", 1) == 1)
    except DistError:
        return True  # said twice is better than not at all
