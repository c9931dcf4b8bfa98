# SPDX-License-Identifier: Apache-2.0
"""How bad input is reported: one clear line in place of a traceback from each process."""

import os
import sys
from typing import NoReturn


def exit_with_error(error: Exception) -> NoReturn:
    """Prints the message once, from rank 0, and ends this process with status 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"pretrain_gpt.py: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
