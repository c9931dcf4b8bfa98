# SPDX-License-Identifier: Apache-2.0
"""Scenarios of several processes for test_link.py: `python link_peers.py FOLDER`.

Writes FOLDER/results.json: scenario → "" or what failed. Imports once and forks the processes of
each scenario. What is asserted of times are bounds that hold however slow the machine is.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

from megatron.mapl import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from megatron.core.pipeline_parallel import p2p_communication  # noqa: E402

from megatron.mapl.emulation import LinkEmulation  # noqa: E402
from megatron.mapl.transfers import leave_together  # noqa: E402
from megatron.mapl.transport import MegatronTransfers, Operation, transfer  # noqa: E402

SIZES = [1, 7, 4096, 128 * 1024 + 1, 300_001]


def both_ways(rank: int) -> None:
    """Messages of several sizes cross; each is whole, in its place, and not before its time."""
    emulation = start(rank, bandwidth=100, latency=100)
    direction, peer = ("next", 1) if rank == 0 else ("prev", 0)
    for dtype in (torch.uint8, torch.bfloat16):
        sent = [message(rank, size).to(dtype) for size in SIZES]
        received = [torch.empty(size, dtype=dtype) for size in SIZES]
        dist.barrier()
        operations = [Operation("recv", into, direction, peer, None) for into in received]
        operations += [Operation("send", tensor, direction, peer, None) for tensor in sent]
        handed_over = time.monotonic()
        works = transfer(operations, emulation)
        for tensor in sent:
            tensor.data = torch.zeros(1)  # as Megatron does with what it has sent
        began = gather(handed_over)
        wire_seconds = 0.0
        for size, work in zip(SIZES, works[len(SIZES) :], strict=True):
            work.wait(timedelta(seconds=200))
            wire_seconds += 8e-6 * size * dtype.itemsize / 100
            assert time.monotonic() >= began[rank] + wire_seconds
        for work in works[: len(SIZES)]:
            work.wait(timedelta(seconds=200))
            work.wait()  # Megatron waits twice for some
        assert time.monotonic() >= began[1 - rank] + wire_seconds + 0.1
        for size, tensor in zip(SIZES, received, strict=True):
            assert tensor.equal(message(1 - rank, size).to(dtype)), size
    emulation.close()


def late_receiver(rank: int) -> None:
    """A message waits for its receiver, whose word takes the link's latency as well."""
    emulation = start(rank, bandwidth=20, latency=50)
    tensor = torch.ones(50_000)
    dist.barrier()
    if rank == 0:
        work = transfer([Operation("send", tensor, "next", 1, None)], emulation)[0]
        assert "rank 1 does not receive" in failure_of(lambda: work.wait(timedelta(seconds=0.1)))
        work.wait()
    else:
        time.sleep(0.3)
        called = time.monotonic()
        transfer([Operation("recv", tensor, "prev", 0, None)], emulation)[0].wait()
    done = time.monotonic()
    ready = gather(0.0 if rank == 0 else called)[1] + 0.05
    left = ready + 8e-6 * tensor.nbytes / 20
    assert done >= (left if rank == 0 else left + 0.05)
    emulation.close()


def reused_buffer(rank: int) -> None:
    """What is sent is what was handed over, though the sender changes it while it is on its way."""
    emulation = start(rank, bandwidth=None, latency=100)
    tensor = torch.full((1000,), 5.0 if rank == 0 else 0.0)
    kind, direction = ("send", "next") if rank == 0 else ("recv", "prev")
    works = transfer([Operation(kind, tensor, direction, 1 - rank, None)], emulation)
    if rank == 0:
        works[0].wait()
        tensor.zero_()
    else:
        works[0].wait()
        assert tensor.eq(5).all()
    emulation.close()


def without_emulation(rank: int) -> None:
    """The same call without links."""
    into = torch.empty(10)
    direction = "next" if rank == 0 else "prev"
    operations = [
        Operation("send", torch.full((10,), float(rank)), direction, 1 - rank, None),
        Operation("recv", into, direction, 1 - rank, None),
    ]
    for work in transfer(operations, None):
        work.wait()
    assert into.eq(1 - rank).all()
    assert transfer([], None) == []


def megatron(rank: int) -> None:
    """Megatron's communicator uses the links, also where the next stage is the previous one."""
    names = ("_p2p_ops", "_batched_p2p_ops")
    originals = [getattr(p2p_communication, name) for name in names]
    emulation = start(rank, bandwidth=50, latency=1)
    transfers = MegatronTransfers(emulation)
    assert all(getattr(p2p_communication, n) != o for n, o in zip(names, originals, strict=True))
    for batched in (False, True):
        config = SimpleNamespace(
            virtual_pipeline_model_parallel_size=None,
            variable_seq_lengths=False,
            mtp_standalone=False,
            use_ring_exchange_p2p=False,
            batch_p2p_comm=batched,
            batch_p2p_sync=False,
            pipeline_dtype=torch.float32,
            timers=None,
        )
        communicator = p2p_communication.P2PCommunicator(dist.group.WORLD, config)
        shape = (100, 2, 8)
        for number in range(4):
            forward, backward = (torch.full(shape, 10.0 * number + 2 * rank + i) for i in (0, 1))
            handed_over = gather(time.monotonic())
            from_prev, from_next = communicator.send_forward_backward_recv_forward_backward(
                forward, backward, recv_prev=True, recv_next=True, tensor_shape=shape
            )
            seconds = 2 * 8e-6 * forward.nbytes / 50 + 0.001  # both cross the one link
            assert time.monotonic() >= handed_over[1 - rank] + seconds
            assert from_prev.eq(10.0 * number + 2 * (1 - rank)).all()
            assert from_next.eq(10.0 * number + 2 * (1 - rank) + 1).all()
    transfers.undo()
    emulation.close()
    assert [getattr(p2p_communication, name) for name in names] == originals


def shared(rank: int) -> None:
    """Two processes of a stage send over one link; its file is gone."""
    stage, peer = rank // 2, (rank + 2) % 4
    emulation = start(stage, bandwidth=20, latency=2)
    dist.barrier()
    assert not list(Path(tempfile.gettempdir()).glob("mapl-link-*"))
    tensor = torch.full((50_000,), float(rank % 2))
    if stage == 1:
        tensor.fill_(-1)
    kind, direction = ("send", "next") if stage == 0 else ("recv", "prev")
    dist.barrier()
    handed_over = time.monotonic()
    transfer([Operation(kind, tensor, direction, peer, None)], emulation)[0].wait()
    arrived = time.monotonic()
    assert tensor.eq(rank % 2).all()
    began, ended = gather(handed_over), gather(arrived)
    assert max(ended[2:]) >= min(began[:2]) + 2 * 8e-6 * tensor.nbytes / 20 + 0.002
    emulation.close()


def ring(rank: int) -> None:
    """Three threads of each process use gloo at once, and so does the job itself."""
    emulation = start(rank, bandwidth=None, latency=0, stages=3)
    neighbours = {"next": (rank + 1) % 3, "prev": (rank - 1) % 3}
    total = torch.zeros(1)
    for number in range(60):
        size = 1 + number * 997
        received = {direction: torch.empty(size) for direction in neighbours}
        operations = []
        for direction, peer in neighbours.items():
            own = torch.full((size,), 1000.0 * rank + number)
            operations.append(Operation("send", own, direction, peer, None))
            operations.append(Operation("recv", received[direction], direction, peer, None))
        works = transfer(operations, emulation)
        dist.all_reduce(total.fill_(1))
        for work in works:
            work.wait()
        for direction, peer in neighbours.items():
            assert received[direction].eq(1000.0 * peer + number).all(), (number, direction)
    assert total == 3, "the job's own collective"
    emulation.close()


def dead_peer(rank: int) -> None:
    """Sends and receives of a process whose peer is gone raise."""
    emulation = start(rank, bandwidth=100, latency=1)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    receiving = transfer([Operation("recv", torch.empty(9), "next", 1, None)], emulation)[0]
    assert "Connection" in failure_of(receiving.wait)

    def send() -> None:
        transfer([Operation("send", torch.ones(9), "next", 1, None)], emulation)[0].wait()
        time.sleep(0.01)

    failure = ""
    for _ in range(1000):
        failure = failure or failure_of(send)
    assert failure.startswith("emulated link from stage 0 to stage 1: sending failed"), failure
    assert "sending failed" in failure_of(emulation.close)
    os._exit(0)  # the dead peer does not take part in the end


def bad_settings(rank: int) -> None:
    """Refused by all processes, in words that name what is wrong."""
    for bandwidth, latency in ((0, 0), (-1, 0), (float("nan"), 0), (1, -1), (1, float("nan"))):
        try:
            start(rank, bandwidth=bandwidth, latency=latency)
        except ValueError as error:
            assert str(latency if bandwidth == 1 else bandwidth) in str(error)
        else:
            raise AssertionError((bandwidth, latency))


#: Scenario → processes.
SCENARIOS: dict[Callable[[int], None], int] = {
    both_ways: 2,
    late_receiver: 2,
    reused_buffer: 2,
    without_emulation: 2,
    megatron: 2,
    shared: 4,
    ring: 3,
    dead_peer: 2,
    bad_settings: 2,
}


def start(stage: int, *, bandwidth: float | None, latency: float, stages: int = 2) -> LinkEmulation:
    return LinkEmulation.start(
        bandwidth_mbit=bandwidth, latency_ms=latency, stage=stage, stages=stages
    )


def message(rank: int, size: int) -> torch.Tensor:
    return torch.arange(size).mul(3 + rank).remainder(251)


def gather(value: float) -> list[float]:
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def failure_of(function: Callable[[], object]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def process(rank: int, scenario: Callable[[int], None], folder: Path) -> None:
    torch.set_num_threads(1)
    world = SCENARIOS[scenario]
    rendezvous = f"file://{folder / scenario.__name__}"
    try:
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world)
        scenario(rank)
        leave_together()
    except BaseException:
        (folder / f"{scenario.__name__}.failed.{rank}").write_text(traceback.format_exc())
        raise


def main(folder: Path) -> None:
    """Runs all scenarios."""
    temporary = folder / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    results = {}
    for scenario, world in SCENARIOS.items():
        begin = time.monotonic()
        try:
            mp.start_processes(process, (scenario, folder), world, start_method="fork")
            failed = ""
        except Exception as error:
            reports = folder.glob(f"{scenario.__name__}.failed.*")
            failed = "\n".join([str(error), *(report.read_text() for report in reports)])
        results[scenario.__name__] = failed
        print(f"{scenario.__name__}: {time.monotonic() - begin:.2f} s", file=sys.stderr)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
