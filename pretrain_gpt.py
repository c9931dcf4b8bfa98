# SPDX-License-Identifier: Apache-2.0
"""Pretrains a GPT or LLaMA with Megatron-LM; with `--mapl-rank` through learned subspaces.

Takes Megatron's own flags. Run it under torchrun, one process a pipeline rank.
"""

import time

from megatron.mapl import cpu


def main() -> None:
    """Builds configuration, model and data, and hands over to Megatron's training loop."""
    start = time.time()
    cpu_mode = cpu.install()  # before anything imports Megatron
    from megatron.mapl import pretraining

    pretraining.run(program_start=start, cpu_mode=cpu_mode)


if __name__ == "__main__":
    main()
