# SPDX-License-Identifier: Apache-2.0
"""How far emulated links are from what they emulate, measured on this machine.

    python tools/bench_emulated_link.py

A message of n bytes takes 8 n / bandwidth + latency, twice the first term if two senders share the
link. What is measured is the time from the hand-over of a message that is waited for to the end of
the receiver's `wait()`, and the median of several rounds is compared:

- one way: a process of stage 0 sends to one of stage 1;
- both ways: both send at once, and neither direction may slow the other down;
- shared: two processes of stage 0 send at once to two of stage 1; the later arrival counts.

Each with main threads that sleep meanwhile, that multiply matrices, and that run plain Python code,
which holds the interpreter's lock. Only the times of a machine with nothing else to do say much:
"other load" is the share of its cores that went to processes other than these.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch.multiprocessing.spawn import start_processes  # noqa: E402

from megatron.mapl.emulation import LinkEmulation  # noqa: E402
from megatron.mapl.transport import Direction, Operation, transfer  # noqa: E402

KIB = 1024
Traffic = Literal["one way", "both ways", "shared"]
Computation = Literal["idle", "matmul", "python"]
TRAFFIC: dict[Traffic, int] = {"one way": 2, "both ways": 2, "shared": 4}  # processes
COMPUTATIONS: tuple[Computation, ...] = ("idle", "matmul", "python")
#: Below it, a scheduler's millisecond is more than the goal of 5 %.
COUNTED_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """One message over one kind of link: Mbit/s, ms, bytes."""

    bandwidth: float
    latency: float
    size: int

    def expected(self, traffic: Traffic) -> float:
        """Seconds from hand-over to arrival."""
        senders = 2 if traffic == "shared" else 1
        return senders * 8e-6 * self.size / self.bandwidth + self.latency / 1e3


CASES = (
    Case(5, 0, 64 * KIB),
    Case(5, 50, 4 * KIB),
    Case(20, 0, 4 * KIB),
    Case(20, 0, 256 * KIB),
    Case(20, 10, 64 * KIB),
    Case(100, 0, 4096 * KIB),
    Case(100, 10, 256 * KIB),
    Case(100, 50, 1024 * KIB),
    Case(500, 0, 64 * KIB),
    Case(500, 0, 4096 * KIB),
    Case(500, 10, 1024 * KIB),
    Case(500, 50, 4096 * KIB),
)


def measure(
    case: Case, traffic: Traffic, computation: Computation, rounds: int, rank: int, world: int
) -> list[float]:
    """On every process: seconds from hand-over to the last arrival, for each round."""
    stage, peer = rank // (world // 2), (rank + world // 2) % world
    emulation = LinkEmulation.start(
        bandwidth_mbit=case.bandwidth, latency_ms=case.latency, stage=stage, stages=2
    )
    sends = stage == 0 or traffic == "both ways"
    receives = stage == 1 or traffic == "both ways"
    direction: Direction = "next" if stage == 0 else "prev"
    data = torch.empty(case.size, dtype=torch.uint8)
    buffer = torch.empty(case.size, dtype=torch.uint8)
    results = []
    for number in range(1, rounds + 1):
        data.fill_(number)
        works = []
        if receives:
            works += transfer([Operation("recv", buffer, direction, peer, None)], emulation)
        time.sleep(case.latency / 1e3 + 0.01)  # until the sender knows that it may begin
        dist.barrier()
        handed_over = time.monotonic()
        if sends:
            works += transfer([Operation("send", data, direction, peer, None)], emulation)
        first_done = wait(works, computation)
        if receives and not buffer.eq(number).all():
            raise RuntimeError("what arrived is not what was sent")
        times: list[Any] = [None] * world
        own = (handed_over if sends else None, first_done if receives else None)
        dist.all_gather_object(times, own)
        if traffic == "both ways":
            # Each direction by itself; the slower one counts.
            results.append(max(times[1][1] - times[0][0], times[0][1] - times[1][0]))
        else:
            begin = min(sent for sent, _ in times if sent is not None)
            results.append(max(got for _, got in times if got is not None) - begin)
    emulation.close()
    return results


def wait(works: list[Any], computation: Computation) -> float:
    """When the first of the works was done; all are done on return.

    A thread of its own looks at the time: a computing one would see the message only after its
    computation, or after that of another process on its core.
    """
    done: list[float] = []

    def look() -> None:
        for work in works:
            work.wait()
            done.append(time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    matrix = torch.randn(256, 256)
    while computation != "idle" and looking.is_alive():
        if computation == "matmul":
            torch.mm(matrix, matrix)
        else:
            sum(range(1000))
    looking.join()
    return done[0]


def process(rank: int, folder: str, traffic: Traffic, rounds: int, results: Any) -> None:
    """One process of one kind of traffic: all cases beside all computations."""
    torch.set_num_threads(1)
    world = TRAFFIC[traffic]
    for computation in COMPUTATIONS:
        for number, case in enumerate(CASES):
            rendezvous = f"file://{folder}/{computation}-{number}"
            dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world)
            seconds = measure(case, traffic, computation, rounds, rank, world)
            if rank == 0:
                results.put((traffic, computation, case, seconds))
            dist.barrier()
            dist.destroy_process_group()


class OtherLoad:
    """How much of this machine's cores is spent on others than this benchmark."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._spent()

    def since_last_call(self) -> float:
        """The share, from 0 to 1."""
        before, self._before = self._before, self._spent()
        seconds, others = (now - then for now, then in zip(self._before, before, strict=True))
        return max(0.0, others / (seconds * (os.cpu_count() or 1)))

    def _spent(self) -> tuple[float, float]:
        """Seconds that passed, and seconds of cores that others took, both from some start."""
        all_times = psutil.cpu_times()
        own = sum(self._process.cpu_times()[:4])
        own += sum(sum(child.cpu_times()[:2]) for child in self._process.children())
        return time.monotonic(), sum(all_times) - all_times.idle - all_times.iowait - own


def main() -> None:
    """Prints the table and the largest error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each case; the median counts")
    rounds = parser.parse_args().rounds
    start = time.monotonic()
    worst: dict[Computation, tuple[float, str]] = {}
    print(f"{os.cpu_count()} cores, median of {rounds} rounds")
    print(HEAD)
    for traffic, world in TRAFFIC.items():
        with tempfile.TemporaryDirectory() as folder:
            results = mp.get_context("fork").SimpleQueue()
            # Forked, so that Megatron is imported once.
            processes = start_processes(
                process,
                (folder, traffic, rounds, results),
                world,
                join=False,
                start_method="fork",
            )
            assert processes is not None
            load = OtherLoad()
            for _ in range(len(COMPUTATIONS) * len(CASES)):
                while results.empty():
                    processes.join(timeout=0.1)  # raises what went wrong in one of them
                line(results.get(), load.since_last_call(), worst)
            processes.join()
    for computation, (error, text) in worst.items():
        print(
            f"largest error, {computation}, where {COUNTED_SECONDS * 1e3:.0f} ms or more are "
            f"expected: {error:+.1%} ({text})"
        )
    print(f"took {time.monotonic() - start:.0f} s")


HEAD = "traffic    meanwhile   Mbit/s   ms      KiB   expected s   measured s    error   other load"


def line(
    result: tuple[Traffic, Computation, Case, list[float]],
    others: float,
    worst: dict[Computation, tuple[float, str]],
) -> None:
    """Prints one case and notes it if it is the worst so far."""
    traffic, computation, case, seconds = result
    expected, measured = case.expected(traffic), statistics.median(seconds)
    error = measured / expected - 1
    name = f"{case.bandwidth:>6g} {case.latency:>4g} {case.size // KIB:>8}"
    counted = expected >= COUNTED_SECONDS
    print(
        f"{traffic:<10} {computation:<10} {name} {expected:>12.4f} {measured:>12.4f} "
        f"{error:>+8.1%} {others:>12.0%}{'' if counted else '   (not counted)'}",
        flush=True,
    )
    if counted and abs(error) > abs(worst.get(computation, (0.0, ""))[0]):
        worst[computation] = (error, f"{traffic}: {' '.join(name.split())}")


if __name__ == "__main__":
    main()
