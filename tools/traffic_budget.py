# SPDX-License-Identifier: Apache-2.0
"""What one boundary will send in a step, before any GPU hour is spent.

    python tools/traffic_budget.py --hidden-size 2048 --rank 128 --vocab-size 32000 \\
        --micro-batch-tokens 16384 --step-tokens 1048576

Builds the layouts that a job builds and adds up their bytes; a test compares it with what a job
reports to have sent. Tokens are those of one data-parallel replica. Every tensor-parallel rank has
its own link to the next stage: with --sequence-parallel it sends its part of the tokens, without it
all of them, as plain Megatron does; the projector's gradient it sends whole.
"""

import argparse
from collections import Counter
from typing import Any

import torch

from mapl import traffic
from mapl.channel import Channel
from mapl.codecs import DtypeCodec
from mapl.payload import Direction, PayloadLayout, id_size
from mapl.traffic import Ledger

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def budget(
    *,
    hidden_size: int,
    rank: int,
    vocab_size: int,
    micro_batch_tokens: int,
    step_tokens: int,
    dtype: torch.dtype,
    tensor_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
) -> dict[str, Any]:
    """The report (see `traffic.report`) of one boundary and one step."""
    if step_tokens % micro_batch_tokens:
        raise ValueError(
            f"--step-tokens {step_tokens} is no multiple of --micro-batch-tokens "
            f"{micro_batch_tokens}"
        )
    ranks = tensor_model_parallel_size
    micro_batches = step_tokens // micro_batch_tokens
    rows_of_a_rank = micro_batch_tokens // ranks if sequence_parallel else micro_batch_tokens
    ledger = Ledger()

    def count(direction: Direction, rows: int, kind: torch.dtype, times: int, ids: bool) -> None:
        layout = PayloadLayout(0, direction, 0, id_size=id_size(vocab_size))
        channel = Channel(layout, rank, DtypeCodec(kind), carries_ids=ids)
        uncompressed = rows * hidden_size * kind.itemsize
        if direction == Direction.PROJECTOR:
            uncompressed = 0
        for _ in range(times):
            ledger.count(channel.layout_of((rows, 1)), uncompressed=uncompressed)

    count(Direction.FORWARD, rows_of_a_rank, dtype, micro_batches * ranks, ids=True)
    count(Direction.BACKWARD, rows_of_a_rank, dtype, micro_batches * ranks, ids=False)
    # Each side sends its own.
    count(Direction.PROJECTOR, hidden_size, torch.float32, 2 * ranks, ids=False)
    return traffic.report([ledger.sent])


def main() -> None:
    """Prints the budget as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("hidden-size", "rank", "vocab-size", "micro-batch-tokens", "step-tokens"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the model")
    args = vars(parser.parse_args())
    try:
        report = budget(**{**args, "dtype": DTYPES[args["dtype"]]})
    except ValueError as error:
        parser.error(str(error))
    total: Counter[str] = Counter(report["total"])
    for kind in ("latents", "ids", "header", "projector"):
        print(f"{kind:<14}{total[kind]:>16,} bytes  {total[kind] / total['sent']:>8.3%}")
    print(f"{'sent':<14}{int(total['sent']):>16,} bytes")
    print(f"{'uncompressed':<14}{int(total['uncompressed']):>16,} bytes")
    print(f"ratio {report['total']['ratio']:.3f}, overhead {report['total']['overhead']:.3%}")


if __name__ == "__main__":
    main()
