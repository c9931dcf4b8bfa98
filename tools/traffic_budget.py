# SPDX-License-Identifier: Apache-2.0
"""What one boundary will send in a step, before any GPU hour is spent.

    python tools/traffic_budget.py --hidden-size 2048 --rank 128 --vocab-size 32000 \\
        --micro-batch-tokens 16384 --step-tokens 1048576 --forward-codec int8 --backward-codec int8

Builds the channels that a job builds and adds up their bytes; a test compares it with what a job
reports to have sent. Tokens are those of one data-parallel replica; the projector's gradient is
sent once for all replicas and tensor-parallel ranks together, and counted whole. Without
--sequence-parallel plain Megatron sends every activation from each tensor-parallel rank, boundaries
send it once (--no-tensor-parallel-split: from each rank, too).
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch

from mapl import traffic
from mapl.channel import WHOLE, Channel, Share
from mapl.codecs import (
    CODECS,
    CodecEnd,
    CodecSettings,
    ResidualVQCodec,
    Role,
    build_codec,
)
from mapl.codecs.settings import RvqSync
from mapl.config import MaplConfig
from mapl.parcel import ParcelChannel
from mapl.payload import Direction, PayloadLayout
from mapl.traffic import Ledger

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DEFAULTS = MaplConfig(rank=[1])
_EXCHANGE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a boundary's traffic depends on; the fields are named as the flags.

    Attributes:
        token_ids: whether they go along forward: with an anchor, here or at a later boundary.
        exchanges: whether its sides exchange a projector's gradient.
    """

    hidden_size: int
    rank: int
    vocab_size: int
    micro_batch_tokens: int
    step_tokens: int
    dtype: str = "bf16"
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    no_tensor_parallel_split: bool = False
    replicas: int = 1
    forward_codec: str = _DEFAULTS.forward_codec[0]
    backward_codec: str = _DEFAULTS.backward_codec[0]
    projector_exchange: str = _DEFAULTS.projector_exchange
    token_ids: bool = True
    exchanges: bool = True
    codecs: CodecSettings = field(default_factory=CodecSettings)


def budget(job: Job) -> dict[str, Any]:
    """The report (see `traffic.report`) of one boundary and one step of one replica.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if job.step_tokens % job.micro_batch_tokens:
        raise ValueError(
            f"--step-tokens {job.step_tokens} is no multiple of --micro-batch-tokens "
            f"{job.micro_batch_tokens}"
        )
    ranks = job.tensor_model_parallel_size
    rows = job.micro_batch_tokens // ranks if job.sequence_parallel else job.micro_batch_tokens
    ledger = Ledger()
    for index in range(ranks):
        for direction, name, role in (
            (Direction.FORWARD, job.forward_codec, Role.ACTIVATION),
            (Direction.BACKWARD, job.backward_codec, Role.GRADIENT),
        ):
            share = Share(index, ranks)
            if job.sequence_parallel or job.no_tensor_parallel_split:
                share = WHOLE
            channel = _channel(job, direction, name, role, share)
            layout = channel.layout_of((rows, 1))
            unsplit = _channel(job, direction, name, role, WHOLE).layout_of((rows, 1))
            for _ in range(job.step_tokens // job.micro_batch_tokens):
                ledger.count(
                    layout,
                    uncompressed=rows * job.hidden_size * DTYPES[job.dtype].itemsize,
                    unsplit=unsplit.total_bytes,
                )
    _count_projector(job, ledger)
    _count_whole_codebooks(job, ledger)
    return traffic.report([ledger.sent])


def _channel(job: Job, direction: Direction, name: str, role: Role, share: Share) -> Channel:
    codec = build_codec(name, _end(job, role, share))
    layout = PayloadLayout(0, direction, vocab_size=job.vocab_size)
    ids = job.token_ids and direction is Direction.FORWARD
    return Channel(layout, job.rank, codec, carries_ids=ids, share=share)


def _end(job: Job, role: Role, share: Share = WHOLE) -> CodecEnd:
    return CodecEnd(
        role=role,
        width=job.rank,
        dtype=DTYPES[job.dtype],
        seed=0,
        settings=job.codecs,
        shards=share.count,
        shard=share.index,
    )


def _count_whole_codebooks(job: Job, ledger: Ledger) -> None:
    """With `--mapl-rvq-sync full` they cross after each step, else five times in a job."""
    for direction, name, role in (
        (Direction.FORWARD_CODEBOOK, job.forward_codec, Role.ACTIVATION),
        (Direction.BACKWARD_CODEBOOK, job.backward_codec, Role.GRADIENT),
    ):
        codec = build_codec(name, _end(job, role))
        if isinstance(codec, ResidualVQCodec) and job.codecs.rvq_sync == "full":
            _count_parcels(job, ledger, direction, "codebook", codec.whole_bytes())


def _count_projector(job: Job, ledger: Ledger) -> None:
    """Both sides send their term, if there is a projector with a gradient."""
    if not job.exchanges:
        return
    size = job.hidden_size * job.rank * _EXCHANGE[job.projector_exchange].itemsize
    for _ in range(2):
        _count_parcels(job, ledger, Direction.PROJECTOR, "projector", size)


def _count_parcels(job: Job, ledger: Ledger, direction: Direction, kind: str, size: int) -> None:
    """All processes that hold the same `size` bytes send their share."""
    processes = job.tensor_model_parallel_size * job.replicas
    layout = PayloadLayout(0, direction)
    share = ParcelChannel(layout, kind, Share(0, processes)).layout_of(size)
    whole = ParcelChannel(layout, kind).layout_of(size)
    for _ in range(processes):
        ledger.count(share, uncompressed=0, unsplit=whole.total_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("hidden-size", "rank", "vocab-size", "micro-batch-tokens", "step-tokens"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--no-tensor-parallel-split", action="store_true")
    parser.add_argument("--replicas", type=int, default=1, help="data-parallel replicas")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the model")
    for direction, codec in (("forward", Job.forward_codec), ("backward", Job.backward_codec)):
        parser.add_argument(f"--{direction}-codec", choices=CODECS, default=codec)
    parser.add_argument("--projector-exchange", choices=_EXCHANGE, default=Job.projector_exchange)
    numbers: dict[str, Callable[[str], Any]] = {
        "codec-group-size": int,
        "topk": int,
        "lowrank-q": int,
        "rvq-groups": int,
        "rvq-rounds": int,
        "rvq-codes": int,
        "rvq-sync-entries": int,
    }
    parser.add_argument("--rvq-sync", choices=get_args(RvqSync), default=argparse.SUPPRESS)
    for name, kind in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Prints the budget as a table."""
    parser = _parser()
    args = vars(parser.parse_args())
    if "codec_group_size" in args:
        args["group_size"] = args.pop("codec_group_size")
    names = {setting.name for setting in fields(CodecSettings)} & set(args)
    codecs = CodecSettings(**{name: args.pop(name) for name in names})
    try:
        report = budget(Job(**args, codecs=codecs))
    except ValueError as error:
        parser.error(str(error))
    total: Counter[str] = Counter(report["total"])
    for kind in traffic.KINDS:
        if total[kind]:
            print(f"{kind:<14}{total[kind]:>16,} bytes  {total[kind] / total['sent']:>8.3%}")
    print(f"{'sent':<14}{int(total['sent']):>16,} bytes")
    print(f"{'uncompressed':<14}{int(total['uncompressed']):>16,} bytes")
    sides = {name: report["boundaries"][0][name] for name in ("forward", "backward")}
    for name, kinds in sides.items():
        size = sum(kinds[kind] for kind in traffic.KINDS)
        print(f"{name:<14}{size / args['step_tokens']:>16,.2f} bytes a token")
    print(
        f"ratio {report['total']['ratio']:.3f}, overhead {report['total']['overhead']:.3%}, "
        f"split factor {report['total']['split_factor']:.3f}"
    )


if __name__ == "__main__":
    main()
