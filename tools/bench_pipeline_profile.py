# SPDX-License-Identifier: Apache-2.0
"""A profile of one step: where the host waits for the device, and what the device does.

Waits are counted for the thread that computes. The threads that stage transfers wait for copies;
that is what they are for.
"""

import gzip
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Calls of the CUDA runtime in which the host waits, and torch's for one number.
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)
#: How many kernels are named.
_NAMED = 20


def profile(step: Callable[[], Any], trace: Path, *, cpu_mode: bool) -> tuple[Any, dict[str, Any]]:
    """Runs `step` under torch's profiler; its result, and what `summarise` says of it.

    Leaves the trace, compressed, at `trace` with ".gz".
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not cpu_mode:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        result = step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    summary = summarise(json.loads(trace.read_text(), strict=False), threading.get_native_id())
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    return result, summary


def summarise(trace: dict[str, Any], thread: int) -> dict[str, Any]:
    """
    Args:
        trace: as Chrome reads it.
        thread: the native id of the thread that computes.

    Returns:
        waits: name → how often that thread waited; the one at the end of the profile included.
        waited_ms: how long, in CUDA's runtime.
        step_ms: from the first to the last event.
        busy_ms: how long this process's kernels and copies ran on the device, overlaps once.
        kernels: name → milliseconds, the longest first.
    """
    waits: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    waited, spans, ends = 0.0, [], []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        name, begin, length = event["name"], event["ts"], event.get("dur", 0.0)
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[name] += length
            spans.append((begin, begin + length))
        if event.get("tid") != thread:
            continue
        ends += [begin, begin + length]
        if name in WAITS:
            waits[name] += 1
            waited += length if name.startswith("cuda") else 0.0
    return {
        "waits": dict(waits),
        "waited_ms": waited / 1e3,
        "step_ms": (max(ends) - min(ends)) / 1e3 if ends else 0.0,
        "busy_ms": _covered(spans) / 1e3,
        "kernels": {name[:120]: length / 1e3 for name, length in kernels.most_common(_NAMED)},
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
