# SPDX-License-Identifier: Apache-2.0
"""Pretrains a GPT or LLaMA with Megatron-LM; with `--mapl-rank` through learned subspaces.

Takes Megatron's own flags. Run it under torchrun, one process a pipeline rank.
"""

import time

from megatron.mapl import session, versions
from megatron.mapl.errors import exit_with_error

START = time.time()


def train() -> None:
    """The script itself, which is one for Megatron like any other."""
    try:
        versions.check(versions.SYMBOLS_OF_OWN_SCRIPT, user="pretrain_gpt.py")
    except versions.UnsupportedMegatronError as error:
        exit_with_error(error)
    from megatron.mapl import gpt

    gpt.train(program_start=START)


if __name__ == "__main__":
    session.run(train)
