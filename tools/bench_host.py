# SPDX-License-Identifier: Apache-2.0
"""What a boundary costs the host: microseconds of the thread that computes, and launches.

    python tools/bench_host.py                     # all codecs
    python tools/bench_host.py --settings mapl --profile 25

One micro-batch goes over a boundary and its gradient comes back, all in this process, without a
network. Four parts, as Megatron's schedule runs them:

- send: a stage's output is encoded and its payload made;
- receive: the payload is checked and decoded;
- receiver's: its backward pass, up to the gradient's payload;
- sender's: the same, from that payload on.

Medians, with the device idle at each start: where a GPU is kept busy, these times are hidden; where
its kernels are shorter than their launches, they are the price. `--profile` names the functions
in which the time goes.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from bench_pipeline_plan import Model, settings
from mapl.config import MaplConfig
from mapl.plan import plan_boundaries
from megatron.mapl.model import StageBoundaries
from megatron.mapl.port import PAYLOAD, take_payload
from megatron.mapl.runtime import MaplRuntime

PARTS = ("send", "receive", "receiver's", "sender's")
#: Calls of CUDA's runtime and driver that put something on a stream.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")


#: A process group of one.
_ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


class Crossing:
    """Both ends of one boundary, and a micro-batch that crosses it."""

    def __init__(self, model: Model, flags: list[str], device: torch.device) -> None:
        config = _config(flags)
        self.runtime = MaplRuntime(
            config=config,
            plan=plan_boundaries(config, hidden_size=model.hidden, boundaries=1),
            vocab_size=model.vocabulary,
            pipeline_size=2,
            pipeline_dtype=torch.bfloat16,
            split_ranks=1,
            seed=1,
        )
        self.sender, self.receiver = (
            StageBoundaries(
                self.runtime,
                SimpleNamespace(virtual_pipeline_model_parallel_size=None, sequence_parallel=False),
                SimpleNamespace(tp=_ALONE, dp_cp=_ALONE),
                stage=stage,
                layers=range(stage, stage + 1),
                receives=stage == 1,
                sends=stage == 0,
            ).to(device, torch.bfloat16)
            for stage in range(2)
        )
        for stage in (self.sender, self.receiver):
            for table in stage.anchor.parameters():
                table.main_grad = torch.zeros(table.shape, device=device)  # type: ignore
        shape = model.sequence, model.micro_batch
        self.ids = torch.randint(0, model.vocabulary, shape[::-1], device=device)
        self.source = torch.randn(*shape, model.hidden, device=device).bfloat16().requires_grad_()
        self.upstream = torch.randn_like(self.source)
        self.device = device

    def run(self, part: Callable[[str], Any]) -> None:
        """One micro-batch there and back; each part is run inside `part(name)`."""
        self.source.grad = None
        hidden = self.source.clone()  # computed by somebody, as a decoder's output is
        with part("send"):
            self.sender.start(self.ids)
            sent = self.sender.send(hidden)
            sent.register_hook(self.sender.unpack_gradient)
        leaf = torch.empty_like(sent, requires_grad=True)
        setattr(leaf, PAYLOAD, take_payload(sent, "send"))
        with part("receive"):
            received = self.receiver.receive(leaf)
            leaf.register_post_accumulate_grad_hook(lambda z: self.receiver.pack_gradient(z.grad))
        with part("receiver's"):
            torch.autograd.backward(received, self.upstream)
        assert leaf.grad is not None
        arrived = torch.empty_like(leaf.grad)
        setattr(arrived, PAYLOAD, take_payload(leaf.grad, "backward"))
        with part("sender's"):
            torch.autograd.backward(sent, arrived)

    def wait(self) -> None:
        """Until the device has done it all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def times(crossing: Crossing, repeats: int) -> dict[str, float]:
    """Part → microseconds, the median."""
    found: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        crossing.wait()
        start = time.perf_counter()
        yield
        found[name].append(time.perf_counter() - start)

    for _ in range(repeats):
        crossing.run(timed)
    return {name: statistics.median(values) * 1e6 for name, values in found.items()}


def launches(crossing: Crossing) -> dict[str, int]:
    """Part → how often something was put on a stream."""
    counts: Counter[str] = Counter()

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        with torch.profiler.profile() as profile:
            yield
            crossing.wait()
        for row in profile.key_averages():
            if row.key.startswith(LAUNCHES):
                counts[name] += row.count

    crossing.run(counted)
    return dict(counts)


def print_profile(crossing: Crossing, repeats: int, rows: int) -> None:
    """The functions that take most of the time, each part apart."""
    profiles = {name: cProfile.Profile() for name in PARTS}

    @contextmanager
    def profiled(name: str) -> Iterator[None]:
        crossing.wait()
        profiles[name].enable()
        yield
        profiles[name].disable()

    with torch.autograd.set_multithreading_enabled(False):  # a profile sees one thread
        for _ in range(repeats):
            crossing.run(profiled)
    for name, profile in profiles.items():
        print(f"\n{name}, {repeats} times")
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(rows)


def _config(flags: list[str]) -> MaplConfig:
    values: dict[str, Any] = {"anchor_rank": None}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--mapl-").replace("-", "_")
        values[name] = [value] if name.endswith("codec") else value
    return MaplConfig(**values | {"rank": [int(values["rank"])]})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    model = Model()
    names = list(settings(model))[1:]
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--profile", type=int, metavar="ROWS", help="functions to name")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "this machine's CPU"
    print(
        f"{name}: {model.sequence * model.micro_batch} tokens, d = {model.hidden}, "
        f"r = {model.rank}; µs of the host (launches)"
    )
    print(f"{'':<10}" + "".join(f"{part:>16}" for part in PARTS) + f"{'together':>12}")
    for name in options.settings:
        crossing = Crossing(model, settings(model)[name], device)
        times(crossing, 3)
        found, counts = times(crossing, options.repeats), launches(crossing)
        cells = (f"{found[part]:>10.0f} ({counts.get(part, 0):>3})" for part in PARTS)
        print(f"{name:<10}" + "".join(cells) + f"{sum(found.values()):>12.0f}", flush=True)
        crossing.runtime.guard.raise_if_faulty()
        if options.profile:
            print_profile(crossing, options.repeats, options.profile)


if __name__ == "__main__":
    main()
