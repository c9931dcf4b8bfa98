# SPDX-License-Identifier: Apache-2.0
"""Predict a training step over given links, and say which boundaries to compress, and how far.

    python tools/plan.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --swiglu \\
        --num-attention-heads 32 --seq-length 4096 --vocab-size 32000 \\
        --micro-batch-size 1 --global-batch-size 64 \\
        --pipeline-model-parallel-size 4 --tensor-model-parallel-size 8 --sequence-parallel \\
        --bandwidth 100000 1000 100000 --latency 0.05 10 0.05 \\
        --device-tflops 989 --mfu 0.4 --max-gap 1

Takes Megatron's flags for the model and its pipeline. Links are given (--bandwidth, --latency: a
number for all, or one for each) or measured (--links, from tools/measure_links.py). How fast a
device computes is given, taken from a log, or measured on this machine. What settings lose comes
from --gaps, a results.json of tools/sweep.py. Prints the plan and writes plan.txt, plan.json and
plan.png to --output-dir.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import plan_device
import plan_gaps
import plan_links
from mapl.files import write_atomically
from plan_figures import draw
from plan_job import Job
from plan_json import to_json
from plan_prediction import Machine, Prediction, predict
from plan_recommendation import recommend
from plan_report import Plan, page
from plan_settings import Setting

#: The longest trainings that the repository has measured: docs/results.md.
GAPS = Path(__file__).parent.parent / "docs" / "results" / "source" / "results.json"


def make(options: argparse.Namespace) -> Plan:
    """Works the plan out.

    Raises:
        ValueError: a flag or a file that does not fit; names it and the remedy.
    """
    given = {field.name: getattr(options, field.name) for field in fields(Job)}
    job = Job(**given)
    if options.devices is not None and not 0 < options.devices < math.inf:
        raise ValueError(f"--devices {options.devices:g} must be positive and finite")
    if not math.isfinite(options.max_gap):
        raise ValueError(f"--max-gap {options.max_gap:g} must be finite: percent, such as 1")
    gaps = plan_gaps.read(options.gaps)
    if options.links is not None:
        if options.latency is not None:
            raise ValueError(
                f"--latency {' '.join(map(str, options.latency))} has no effect with --links, "
                "which has its own; leave one of them out"
            )
        links = plan_links.measured(options.links, job.pipeline_model_parallel_size, job.links)
    else:
        links = plan_links.given(options.bandwidth, options.latency or [0.0], job.links)
    flops, speed = _speed(options, job)
    machine = Machine(flops, tuple(links), options.devices)
    predictions, refused = _predictions(job, machine, gaps)
    settings = [p.setting for p in predictions if p.setting.gap is not None and p.setting.flags]
    advice = recommend(job, machine, settings, options.max_gap)
    return Plan(job, machine, speed, gaps, predictions, advice, refused)


def _predictions(
    job: Job, machine: Machine, gaps: plan_gaps.Gaps
) -> tuple[list[Prediction], dict[str, str]]:
    """Of plain Megatron, of int8 without a projector, and of all settings that were measured."""
    int8 = {
        "rank": [job.hidden_size], "projector": "none", "anchor": "none",
        "forward_codec": ["int8"], "backward_codec": ["int8"],
    }  # fmt: skip
    settings = gaps.carried_over(job.hidden_size)
    same = [s for s in settings if s.flags == int8]
    predictions = [predict(job, Setting("uncompressed", {}, 0.0), machine)]
    refused = dict(gaps.ignored)
    for setting in [*([] if same else [Setting("direct int8", int8)]), *settings]:
        try:
            predictions.append(predict(job, setting, machine))
        except ValueError as error:
            refused[setting.name] = str(error)
    return predictions, refused


def _speed(options: argparse.Namespace, job: Job) -> tuple[float, str]:
    """FLOP/s of a device, and where it comes from."""
    if options.mfu is not None and options.device_tflops is None:
        raise ValueError(
            f"--mfu {options.mfu:g} has no effect without --device-tflops; leave it out"
        )
    if options.device_tflops is not None:
        mfu = 1.0 if options.mfu is None else options.mfu
        if not (0 < options.device_tflops < math.inf and 0 < mfu <= 1):
            raise ValueError(
                f"--device-tflops {options.device_tflops:g} must be positive and finite, and --mfu "
                f"{mfu:g} above 0 and at most 1"
            )
        return options.device_tflops * mfu * 1e12, "as given"
    if options.throughput_log is not None:
        return plan_device.from_throughput(options.throughput_log), f"by {options.throughput_log}"
    if options.step_log is not None:
        flops = plan_device.from_steps(options.step_log, job, options.devices)
        return flops, f"by the steps of {options.step_log}"
    return plan_device.measure(job), "one layer measured here"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_job(parser.add_argument_group("the job, as Megatron's flags"))
    links = parser.add_argument_group("links between stages")
    one = links.add_mutually_exclusive_group(required=True)
    one.add_argument("--bandwidth", type=float, nargs="+", metavar="MBIT",
                     help="Mbit/s of payload each way: one number, or one for each link "
                          "between consecutive stages; with virtual stages of 3 processes or "
                          "more also for that from the last to the first")  # fmt: skip
    one.add_argument("--links", type=Path, metavar="JSON", help="of tools/measure_links.py")
    links.add_argument("--latency", type=float, nargs="+", metavar="MS",
                       help="one way, for all links or for each (default: 0)")  # fmt: skip
    devices = parser.add_argument_group("devices")
    one = devices.add_mutually_exclusive_group(required=True)
    one.add_argument("--device-tflops", type=float, metavar="T",
                     help="TFLOP/s of one device, sustained, or its peak with --mfu")  # fmt: skip
    one.add_argument("--throughput-log", type=Path, metavar="LOG",
                     help="of a run without a pipeline, with --log-throughput")  # fmt: skip
    one.add_argument("--step-log", type=Path, metavar="LOG",
                     help="of this job, uncompressed, over a fast network")  # fmt: skip
    one.add_argument("--measure", action="store_true",
                     help="one layer, on this machine, in torch, in --dtype; tensor-parallel "
                          "ranks are taken to share it without loss")  # fmt: skip
    devices.add_argument("--mfu", type=float, metavar="F", help="part of --device-tflops in use")
    devices.add_argument("--devices", type=float, metavar="N",
                         help="that all stages share (default: one each; of --tensor-model-"
                              "parallel-size, groups)")  # fmt: skip
    parser.add_argument("--gaps", type=Path, default=GAPS, metavar="JSON",
                        help="results.json of tools/sweep.py (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-gap", type=float, required=True, metavar="PERCENT",
                        help="that validation loss may lose to uncompressed training")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("plan-out"),
                        help="default: %(default)s")  # fmt: skip
    return parser


def _add_job(group: argparse._ArgumentGroup) -> None:
    for name in ("num-layers", "hidden-size", "num-attention-heads", "seq-length", "vocab-size",
                 "micro-batch-size", "pipeline-model-parallel-size"):  # fmt: skip
        group.add_argument(f"--{name}", type=int, required=True, metavar="N")
    group.add_argument("--global-batch-size", type=int, required=True, metavar="N",
                       help="of one data-parallel replica")  # fmt: skip
    for name in ("ffn-hidden-size", "num-query-groups", "kv-channels"):
        group.add_argument(f"--{name}", type=int, metavar="N", help="default: Megatron's")
    defaults = (
        ("num-virtual-stages-per-pipeline-rank", Job.num_virtual_stages_per_pipeline_rank),
        ("tensor-model-parallel-size", Job.tensor_model_parallel_size),
        ("make-vocab-size-divisible-by", Job.make_vocab_size_divisible_by),
    )
    for name, number in defaults:
        group.add_argument(f"--{name}", type=int, default=number, metavar="N",
                           help="default: %(default)s")  # fmt: skip
    for name in ("swiglu", "sequence-parallel", "account-for-embedding-in-pipeline-split",
                 "account-for-loss-in-pipeline-split"):  # fmt: skip
        group.add_argument(f"--{name}", action="store_true")
    group.add_argument("--recompute-granularity", choices=["full"])
    group.add_argument("--distributed-backend", choices=["nccl", "gloo"],
                       default=Job.distributed_backend, help="default: %(default)s")  # fmt: skip
    group.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default=Job.dtype,
                       help="of the model (default: %(default)s)")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Makes a plan: exit code 2 and one line on stderr for a flag or a file at fault."""
    options = _parser().parse_args(argv)
    try:
        plan = make(options)
        text = page(plan)
        print(text)
        output: Path = options.output_dir
        write_atomically(output / "plan.txt", text + "\n")
        write_atomically(output / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
        draw(plan, output / "plan.png")
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\nWritten: {output / 'plan.txt'}, .json and .png beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
