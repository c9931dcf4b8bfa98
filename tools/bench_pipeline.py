# SPDX-License-Identifier: Apache-2.0
"""What boundaries cost where the network costs nothing: a 1B LLaMA in pipeline stages on one host.

    python tools/bench_pipeline.py --layout gloo-pp4          # four stages on one GPU
    python tools/bench_pipeline.py --layout nccl-pp2-vpp2     # four virtual stages on two GPUs
    python tools/bench_pipeline.py --layout single            # one stage, so no boundary
    python tools/bench_pipeline.py --layout gloo-pp4 --profile profiles --settings plain mapl

Trains each setting for some steps, all of them in turn, and again in each round; a step's time is
the median over the last steps of all rounds. Prints a line after each training, then tables, and
writes --output. Stops before --time-limit: what was measured until then is printed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench_pipeline_plan import LAYOUTS, PLAIN, TINY, Layout, Model, settings
from bench_pipeline_tables import page
from gpu_timing import gemm_rate

ROOT = Path(__file__).resolve().parent.parent
JOB = Path(__file__).with_name("bench_pipeline_job.py")

#: FLOP/s of dense bf16 on an H100 SXM or H200, by their data sheet.
DATASHEET = 989e12
#: Steps, from 0, that are profiled: compiled and warm.
_PROFILED = 5


def main() -> int:
    """Returns 0, or 1 if a training failed."""
    options = _options()
    model = TINY if options.tiny else Model()
    chosen = {
        "layers": options.layers,
        "micro_batch": options.micro_batch_size,
        "micro_batches": options.micro_batches,
        "rank": options.rank,
    }
    model = replace(model, **{name: value for name, value in chosen.items() if value is not None})
    deadline = time.monotonic() + options.time_limit
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "layout": options.layout,
        "gpus": LAYOUTS[options.layout].gpus,
        "model": asdict(model),
        "parameters": model.parameters,
        "flops_a_token": model.flops_a_token,
        "tokens": model.tokens,
        "torch": torch.__version__,
        "peak": measured_peak(),
        "datasheet": DATASHEET,
        "warm_up": options.warm_up,
        "trainings": [],
    }
    failed, longest = False, 0.0
    for number in range(options.rounds):
        for name in options.settings:
            if time.monotonic() + longest > deadline:
                print(f"{name}, round {number}: left out, --time-limit {options.time_limit:g}")
                continue
            began = time.monotonic()
            folder = options.work_dir / f"{options.layout}-{name}-{number}"
            limit = deadline + 30 - began
            training = train(name, model, options, folder, limit)
            longest = max(longest, time.monotonic() - began)
            training |= {"setting": name, "round": number, "seconds": time.monotonic() - began}
            failed |= "error" in training
            report["trainings"].append(training)
            print(_line(training, options.warm_up), flush=True)
            options.output.write_text(json.dumps(report, indent=1))
    print(page(report))
    return int(failed)


def train(
    name: str, model: Model, options: argparse.Namespace, folder: Path, limit: float
) -> dict[str, Any]:
    """One training.

    Returns:
        What its processes noted, by rank, and the ratio of its run report; or the error.
    """
    layout = LAYOUTS[options.layout]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.json"):
        old.unlink()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    if options.profile is not None:
        # In the middle of the pipeline, where both neighbours are.
        environment["PROFILE_RANK"] = str(layout.processes // 2)
        environment["PROFILE_STEP"] = str(min(_PROFILED, options.steps - 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(layout.processes), str(JOB), *model.flags(options.steps)]
    command += [*_spread(layout), *settings(model)[name], *options.more.split()]
    with (folder / "log").open("w") as log:
        code = _run(command, limit, cwd=folder, env=environment, stdout=log, stderr=log)
    ranks = [folder / f"rank-{rank}.json" for rank in range(layout.processes)]
    if code != 0 or not all(rank.exists() for rank in ranks):
        text = (folder / "log").read_text()
        why = "out of time" if code is None else f"exit code {code}"
        return {"error": why, "log": text[-options.log_tail :]}
    result: dict[str, Any] = {"ranks": [json.loads(rank.read_text()) for rank in ranks]}
    traffic = folder / "mapl-report" / "mapl_traffic.json"
    if traffic.exists():
        result["ratio"] = json.loads(traffic.read_text())["total"].get("ratio")
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        trace = options.profile / f"{options.layout}-{name}.json.gz"
        shutil.copyfile(folder / "trace.json.gz", trace)
    return result


def _run(command: list[str], limit: float, **how: Any) -> int | None:
    """The exit code of a torchrun, or None if it had to be ended after `limit` seconds."""
    process = subprocess.Popen(command, **how)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its workers, and those that do not listen after 30 s
        process.wait()
        return None


def _spread(layout: Layout) -> list[str]:
    backend = [] if layout.backend is None else ["--distributed-backend", layout.backend]
    return layout.flags.split() + backend


def measured_peak() -> float | None:
    """FLOP/s of a large multiplication in bf16 on this GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    rate = gemm_rate(torch.bfloat16)
    torch.cuda.empty_cache()  # the trainings are other processes
    return rate


def _line(training: dict[str, Any], warm_up: int) -> str:
    name = f"{training['setting']}, round {training['round']}"
    if "error" in training:
        return f"{name}: {training['error']}\n{training['log']}"
    times = training["ranks"][-1]["times"]
    steps = [after - before for before, after in pairwise(times)][warm_up:]
    return (
        f"{name}: {statistics.median(steps) * 1e3:.1f} ms a step ({len(steps)} steps, "
        f"{min(steps) * 1e3:.1f} to {max(steps) * 1e3:.1f}), {training['seconds']:.0f} s in all, "
        f"loss {_first_and_last(training)}"
    )


def _first_and_last(training: dict[str, Any]) -> str:
    losses = next(rank["losses"] for rank in reversed(training["ranks"]) if rank["losses"])
    return f"{losses[0]:.3f} → {losses[-1]:.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = list(settings(TINY))
    add("--layout", choices=LAYOUTS, default="gloo-pp4")
    add("--settings", nargs="+", choices=names, default=None, help="default: all; single: plain")
    add("--rounds", type=int, default=2, help="how often each setting trains, in turn")
    add("--steps", type=int, default=14, help="of a training")
    add("--warm-up", type=int, default=4, help="steps at its start that do not count")
    add("--layers", type=int)
    add("--micro-batch-size", type=int, help="sequences")
    add("--micro-batches", type=int, help="of a step")
    add("--rank", type=int, help="--mapl-rank")
    add("--more", default="", help="further flags of pretrain_gpt.py, in one string")
    add("--tiny", action="store_true", help="a model for a look at the bench, on any machine")
    add("--profile", type=Path, metavar="DIR", help="profile one step of one process there")
    add("--time-limit", type=float, default=540, help="seconds for everything")
    add("--log-tail", type=int, default=3000, help="characters of a failed training's log")
    add("--work-dir", type=Path, default=Path("bench-pipeline"), help="for logs and reports")
    add("--output", type=Path, default=Path("bench_pipeline.json"))
    options = parser.parse_args()
    if options.settings is None:
        options.settings = [PLAIN] if LAYOUTS[options.layout].backend is None else names
    if options.steps < options.warm_up + 2:
        parser.error(
            f"--steps {options.steps} leaves none to measure after --warm-up {options.warm_up}; "
            "raise --steps"
        )
    options.work_dir = options.work_dir.resolve()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
