# SPDX-License-Identifier: Apache-2.0
"""Train over slow links on one machine, without and with compression, and compare the times.

    sudo .venv/bin/python tools/bench_slow_network.py [--quick]

Each pipeline stage runs on a host of its own (a network namespace), joined to its neighbours by
links of limited bandwidth (veth and tc's token bucket). Real Megatron, gloo and real data. Each
setting trains once; the bandwidth changes while it runs. Needs Linux and root. Whatever happens to
it, its processes end and its network is removed; the machine's own network is never touched.

Prints, and writes to the output directory: slow_network.md, .json and .png, and the logs and run
reports of all trainings.
"""

import argparse
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import slow_network_plan as plan
from mapl.files import write_atomically
from shaped_hosts import CONGESTION_CONTROL, NetworkError, ShapedHosts, check_machine
from slow_network_figures import draw
from slow_network_job import ROOT, JobError
from slow_network_measuring import Measuring
from slow_network_progress import Progress
from slow_network_results import Results
from slow_network_tables import page

#: Sizes, effort, and the trainings, True for those over an emulated link.
Plan = tuple[plan.Sizes, plan.Effort, list[tuple[plan.Setting, bool]]]


def bench(options: argparse.Namespace, what: Plan) -> int:
    """Measures, notes after each training what there is, and publishes it at the end.

    Returns:
        0, or 1 if a training failed.

    Raises:
        NetworkError: the network cannot be built.
        JobError: the data could not be prepared.
    """
    output: Path = options.output_dir
    sizes, effort, jobs = what
    data = prepare(output / "data" / "stdlib", options.data_prefix)
    results = Results(sizes, _machine(), effort.curve_mbit)
    with ShapedHosts(sizes.stages) as hosts:
        progress = Progress(sizes, effort, jobs)
        measuring = Measuring(hosts, results, effort, data, output, progress)
        measuring.measure_links()
        for setting, emulated in jobs:
            progress.start(setting, emulated)
            try:
                (measuring.emulate if emulated else measuring.measure)(setting)
            except JobError as error:
                name = f"{setting.name}, emulated" if emulated else setting.name
                progress.say(f"{name} failed: {error}")
                results.failed[name] = error.brief
            write_atomically(output / "slow_network.json", results.to_json())
    publish(results, output)
    return 1 if results.failed else 0


def planned(options: argparse.Namespace) -> Plan:
    """What to measure.

    Raises:
        ValueError: naming an option that does not fit.
    """
    if options.stages < 2:
        raise ValueError(f"--stages {options.stages}: a link needs two hosts; give 2 or more")
    if options.hidden_size < 128 or options.hidden_size % 128:
        raise ValueError(
            f"--hidden-size {options.hidden_size}: heads have 128 numbers; give a multiple of 128"
        )
    if options.bandwidths and min(options.bandwidths) <= 0:
        raise ValueError(
            f"--bandwidths {' '.join(map(str, options.bandwidths))}: give positive numbers of "
            "Mbit/s"
        )
    sizes = plan.Sizes(stages=options.stages, hidden=options.hidden_size)
    effort = plan.QUICK if options.quick else plan.Effort()
    if options.bandwidths:
        chosen = tuple(sorted(set(options.bandwidths)))
        effort = replace(effort, bandwidths=chosen, curve_mbit=chosen[len(chosen) // 2])
    settings = plan.settings(sizes.hidden)
    names = [setting.name for setting in settings]
    if unknown := set(options.settings or []) - set(names):
        raise ValueError(
            f"--settings {' '.join(map(repr, sorted(unknown)))}: there is no such setting; there "
            f"are {', '.join(map(repr, names))}"
        )
    if options.settings:
        settings = [setting for setting in settings if setting.name in options.settings]
    elif options.quick:
        settings = [setting for setting in settings if setting.quick]
    jobs = []
    for setting in settings:
        jobs.append((setting, False))
        if setting.emulate and not options.no_emulation:
            # At once: what other programs do to this machine changes slowly.
            jobs.append((setting, True))
    return sizes, effort, jobs


def prepare(prefix: Path, given: Path | None) -> list[str]:
    """Makes the dataset, or finds it there; the flags that train on it.

    Args:
        prefix: where the standard library's source code goes, as a dataset.
        given: the prefix of a dataset that prepare_data.py has made, in its place.

    Raises:
        JobError: it could not be made.
    """
    if given is None:
        print("Preparing the corpus: the source code of Python's standard library", flush=True)
        command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--source", "stdlib"]
        command += ["--output-prefix", str(prefix), "--vocab-size", "2048", "--overwrite"]
        if subprocess.run(command).returncode:
            raise JobError(f"preparing the corpus failed, as said above: {shlex.join(command)}")
    prefix = given or prefix
    manifest = prefix.with_name(prefix.name + ".json")
    try:
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    except FileNotFoundError:
        raise JobError(
            f"--data-prefix {prefix}: there is no {manifest}; make the dataset with "
            "tools/prepare_data.py"
        ) from None
    part = "_train" if prefix.with_name(prefix.name + "_train.bin").exists() else ""
    return [
        *("--data-path", f"{prefix}{part}", "--split", "100,0,0"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"),
        # Megatron's own cache of an older dataset would be taken for this one's.
        *("--data-cache-path", str(prefix.with_name(f"cache-{digest}"))),
    ]


def publish(results: Results, output: Path) -> None:
    """Prints the tables, and writes them, the figures and the picture."""
    print(f"\n{page(results, markdown=False)}\n")
    text = f"# Training over slow links\n\n{page(results, markdown=True)}\n"
    if results.timings:
        draw(results, output / "slow_network.png")
        text += "\n![](slow_network.png)\n"
    write_atomically(output / "slow_network.md", text)
    print(f"Written: {output / 'slow_network.md'}, .json and .png beside it.")


def _machine() -> dict[str, str]:
    """What the times depend on beside the sizes."""
    return {
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU": _cpu(),
        "Linux": platform.release(),
        "TCP congestion control": CONGESTION_CONTROL,
        "torch": torch.__version__,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench: exit code 1 if a training failed, 2 if the machine or an option is unfit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("slow-network-out"), help="default: %(default)s")
    add("--quick", action="store_true", help="fewer settings, bandwidths and steps")
    add("--settings", nargs="+", metavar="NAME", help="these alone, by name")
    add("--bandwidths", nargs="+", type=float, metavar="MBIT", help="Mbit/s of each link")
    add("--no-emulation", action="store_true", help="no runs with --mapl-emulate-bandwidth")
    add("--stages", type=int, default=4, help="hosts (default: %(default)s)")
    add("--hidden-size", type=int, default=256, help="d (default: %(default)s)")
    add("--data-prefix", type=Path, help="of a dataset that tools/prepare_data.py has made")
    add("--redraw", type=Path, metavar="JSON", help="tables and picture of an earlier call alone")
    options = parser.parse_args(argv)
    try:
        what = planned(options)
    except ValueError as error:
        print(f"bench_slow_network.py: error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an end in order, as for Ctrl-C
    try:
        if options.redraw:
            publish(Results.from_json(options.redraw.read_text()), options.output_dir)
            return 0
        check_machine()
        return bench(options, what)
    except NetworkError as error:
        print(f"bench_slow_network.py: error: {error}", file=sys.stderr)
        return 2
    except (JobError, OSError) as error:
        print(f"bench_slow_network.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench_slow_network.py: interrupted; its processes and its network are gone",
              file=sys.stderr)  # fmt: skip
        return 130


if __name__ == "__main__":
    sys.exit(main())
