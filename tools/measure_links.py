# SPDX-License-Identifier: Apache-2.0
"""Measure the links between the hosts of a job: bandwidth and latency, in both directions.

    torchrun --nnodes 4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        tools/measure_links.py --output links.json

Start it with one process on the host of each pipeline stage. Rank p stands for stage p. All pairs
of ranks are measured, one after the other, with the messages and over the interfaces that a job
would use (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME):

- latency: half of what 8 bytes take there and back, median; the two ways cannot be told apart
  without a common clock
- bandwidth: of payload, each way alone and both ways at once, median of three rounds

Since one pair is measured at a time, each has the hosts' interfaces to itself. In a pipeline a
middle stage sends forward and backward at once, to two neighbours: over one interface these share
its bandwidth.

Rank 0 prints a table and writes the file that tools/plan.py reads (--links).
"""

import argparse
import math
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist

from link_measurements import Measured, Measurements
from link_streams import Pair
from text_table import columns

#: Longer than all other pairs take together.
_TIMEOUT = timedelta(hours=6)


def measure(seconds: float, device: torch.device) -> Measurements:
    """Measures all pairs; to be called on every rank.

    Args:
        seconds: that a stream is to take, of which there are some twenty a pair.
        device: of the messages.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    own = []
    for one, other in combinations(range(size), 2):
        dist.barrier()
        if rank in (one, other):
            own.append(_incoming(rank, other if rank == one else one, seconds, device))
    hosts: list[str] = [""] * size
    everyone: list[list[Measured]] = [[] for _ in range(size)]
    dist.all_gather_object(hosts, socket.gethostname())
    dist.all_gather_object(everyone, own)
    links = sorted((m for each in everyone for m in each), key=lambda m: (m.sender, m.receiver))
    return Measurements(dist.get_backend(), hosts, links)


def _incoming(rank: int, peer: int, seconds: float, device: torch.device) -> Measured:
    """What comes from a peer, while the peer measures what comes from here."""
    first = rank < peer
    pair = Pair(peer, first=first, seconds=seconds, device=device)
    latency = pair.latency()
    alone: list[float] = []
    for sends in (first, not first):
        alone += pair.incoming(sends=sends, receives=not sends)
    both = pair.incoming(sends=True, receives=True)
    return Measured(
        sender=peer,
        receiver=rank,
        mbit=statistics.median(alone),
        mbit_both_ways=statistics.median(both),
        latency_ms=latency * 1e3,
        mbit_both_ways_spread=(max(both) - min(both)) / 2 / statistics.median(both),
    )


def table(measured: Measurements) -> str:
    """One line for each direction of each link."""
    names = ("from", "to", "Mbit/s alone", "Mbit/s both ways", "± half the range", "latency ms")
    cells = [
        [f"{m.sender} ({measured.hosts[m.sender]})", f"{m.receiver}", f"{m.mbit:,.4g}",
         f"{m.mbit_both_ways:,.4g}", f"{m.mbit_both_ways_spread:.1%}", f"{m.latency_ms:.3g}"]
        for m in measured.links
    ]  # fmt: skip
    return columns(names, cells, markdown=False)


def check(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: what was asked for cannot be measured here.
    """
    if "RANK" not in os.environ:
        raise ValueError("it needs a process on each host; start it with torchrun")
    if os.environ["WORLD_SIZE"] == "1":
        raise ValueError("one process has no link; start 2 or more with torchrun's --nnodes")
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"--seconds {options.seconds:g} must be positive and finite")
    if options.distributed_backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("--distributed-backend nccl needs a GPU; use gloo")
    if os.environ["RANK"] == "0":
        _check_writable(options.output)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {path}: {error.strerror}; name a file that rank 0 can write"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """One rank: exit code 2 for a call at fault."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("links.json"), help="default: %(default)s")
    add("--distributed-backend", choices=["gloo", "nccl"],
        default="nccl" if torch.cuda.is_available() else "gloo",
        help="default: nccl where there is a GPU")  # fmt: skip
    add("--seconds", type=float, default=0.5,
        help="of a stream; a pair takes some twenty of them (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        check(options)
    except ValueError as error:
        print(f"measure_links.py: error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    if options.distributed_backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(options.distributed_backend, timeout=_TIMEOUT)
    try:
        measured = measure(options.seconds, device)
        if dist.get_rank() == 0:
            measured.write(options.output)
            print(table(measured))
            print(f"\nWritten: {options.output}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
