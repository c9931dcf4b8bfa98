# SPDX-License-Identifier: Apache-2.0
"""What lies between a latent and its payload: checked, then timed as kernels and in plain torch.

    python tools/bench_wire.py

Microseconds on the GPU, from graphs (`tools/gpu_timing.py`): encode and decode are the codec's,
pack and unpack the whole way of a message, with 16384 token ids, header and checksum. What a graph
cannot capture, in plain torch, is called, and its launches then count too; such times have a star.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_timing import call_time, graph_time
from mapl.channel import Channel
from mapl.codecs import CODECS, CodecEnd, CodecSettings, Role, build_codec
from mapl.payload import Direction, PayloadLayout
from mapl.payload_guard import PayloadGuard
from mapl.traffic import Ledger

TOKENS, VOCABULARY, SETS = 16384, 128256, 4
#: How many times faster than plain torch the encoding of residual vector quantisation is to be.
RVQ_GOAL = 5.0


@dataclass(frozen=True)
class Case:
    """A codec, what it carries, and r."""

    name: str
    role: Role
    width: int

    def end(self, sends: bool) -> CodecEnd:
        """One end of it, in a bf16 model."""
        return CodecEnd(
            role=self.role,
            width=self.width,
            dtype=torch.bfloat16,
            seed=3,
            settings=CodecSettings(topk=self.width // 8, lowrank_q=16),
            sends=sends,
        )

    def channel(self, sends: bool) -> Channel:
        """The same with its messages."""
        layout = PayloadLayout(1, Direction.FORWARD, vocab_size=VOCABULARY)
        codec = build_codec(self.name, self.end(sends)).cuda().eval()
        return Channel(layout, self.width, codec, carries_ids=True)


CASES = [
    Case(name, role, width)
    for name in CODECS
    for role in (Role.ACTIVATION, Role.GRADIENT)
    for width in ((128, 256, 512) if name == "rvq" else (256,))
    if (name != "rvq" or role is Role.ACTIVATION) and (name != "lowrank" or role is Role.GRADIENT)
]


def check(case: Case) -> None:
    """Compares what kernels and plain torch decode from the same bytes.

    Raises:
        AssertionError: they differ.
    """
    rows = torch.randn(1000, case.width, device="cuda", dtype=torch.bfloat16)
    decoded = []
    body: Tensor | None = None
    for ops in ("triton", "reference"):
        os.environ["MAPL_OPS"] = ops
        if body is None:
            body = build_codec(case.name, case.end(True)).cuda().encode(rows, 0)
        out = torch.full_like(rows, float("nan"))
        build_codec(case.name, case.end(False)).cuda().decode([body], out, 0)
        decoded.append(out)
    assert torch.equal(*decoded), f"{case}: kernels decode otherwise than plain torch"


def microseconds(calls: Sequence[Callable[[], object]]) -> tuple[float, bool]:
    """Of one call, and whether a graph could be captured."""
    try:
        return graph_time(calls), True
    except RuntimeError:  # a copy from the host, which no graph holds
        torch.cuda.synchronize()
    return call_time(calls), False


def measure(case: Case) -> dict[str, tuple[float, bool]]:
    """Verb → microseconds, as MAPL_OPS says."""
    rows = [
        torch.randn(TOKENS, 1, case.width, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)
    ]
    outs = [torch.empty_like(one) for one in rows]
    ids = torch.randint(0, VOCABULARY, (TOKENS, 1), device="cuda")
    sender, receiver = case.channel(True), case.channel(False)
    ledger, guard = Ledger(), PayloadGuard()
    payloads = [sender.pack(one, ids, ledger, 0) for one in rows]
    codec, other = sender.codec, receiver.codec
    flat = [one.view(-1, case.width) for one in rows]
    bodies = [torch.empty(codec.body_bytes(TOKENS), dtype=torch.uint8, device="cuda") for _ in rows]
    sets = range(SETS)

    def unpack(number: int) -> None:
        receiver.received = number
        receiver.unpack([payloads[number]], outs[number], guard)

    verbs: dict[str, Callable[[int], object]] = {
        "encode": lambda i: codec.encode_into(flat[i], i, bodies[i]),
        "decode": lambda i: other.decode([bodies[i]], outs[i].view(-1, case.width), i),
        "pack": lambda i: sender.pack(rows[i], ids, ledger, 0),
        "unpack": unpack,
    }
    return {
        verb: microseconds([lambda i=i, call=call: call(i) for i in sets])  # type: ignore[misc]
        for verb, call in verbs.items()
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_wire.py needs a GPU and this machine has none")
    for case in CASES:
        check(case)
    print(f"{torch.cuda.get_device_name()}: {TOKENS} tokens, µs in plain torch → as kernels")
    slowest = float("inf")
    for case in CASES:
        times = []
        for ops in ("reference", "triton"):
            os.environ["MAPL_OPS"] = ops
            times.append(measure(case))
        line = f"{case.name:<9}{case.role.value:<11}r={case.width:<4}"
        for verb, (plain, captured) in times[0].items():
            kernels, _ = times[1][verb]
            star = " " if captured else "*"
            line += f" {verb} {plain:>7.0f}{star}→{kernels:>5.0f} ({plain / kernels:.1f}×)"
            if case.name == "rvq" and verb == "encode":
                slowest = min(slowest, plain / kernels)
        print(line, flush=True)
    print(f"rvq encodes {slowest:.1f} times as fast as plain torch (goal ≥ {RVQ_GOAL})")


if __name__ == "__main__":
    main()
