# SPDX-License-Identifier: Apache-2.0
"""Train a list of settings, and compare what each loses with what it saves.

    python tools/sweep.py LIST.toml --output DIR [--data PREFIX] [--only NAME ...]
        [--workers N] [--seconds S] [--retry] [--redo NAME ...] [--report-only]

The list (tools/sweeps has some; tools/sweep_list.py says what may stand in one) names the settings;
PREFIX is a dataset of tools/prepare_data.py. Each run has a folder of its own in DIR. Ctrl-C,
SIGTERM and --seconds have the runs save and end; called again, what is finished is left alone, and
the rest goes on where it was. A run that crashed is told, and stays so until --retry.

Writes results.json, results.md, pareto.png and losses.png into DIR, after each call, of all that is
there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import sweep_list
from mapl.files import write_atomically
from sweep_figures import draw_curves, draw_pareto
from sweep_job import RunFolder
from sweep_list import SweepError
from sweep_results import collect
from sweep_runner import run_all
from sweep_tables import page


def sweep(options: argparse.Namespace) -> int:
    """Runs what is to be run, and publishes what there is.

    Returns:
        0; 1 if runs have crashed; 3 if it was stopped before all were done.

    Raises:
        SweepError: the list, an option or a folder is not one to work with.
    """
    output: Path = options.output
    plan = sweep_list.read(options.list, options.data, to_run=not options.report_only)
    folders = [RunFolder(run, output) for run in plan.runs]
    settings = {run.setting for run in plan.runs}
    for option in ("only", "redo"):
        if unknown := sorted(set(getattr(options, option)) - settings):
            raise SweepError(f"--{option} {' '.join(unknown)}: {options.list} has no run of that "
                             f"name; it has {', '.join(sorted(settings))}")  # fmt: skip
    for folder in folders:
        if folder.run.setting not in options.redo:
            folder.check_flags(options.list)
    stopped = None
    if not options.report_only:
        names = {*options.only, *options.redo} if options.only else settings
        chosen = [folder for folder in folders if folder.run.setting in names]
        for folder in chosen:
            if folder.run.setting in options.redo:
                folder.delete()
            if options.retry:
                folder.forget_failure()
        todo = [f for f in chosen if f.result is None and f.failure is None]
        print(f"{len(chosen)} runs, {len(todo)} of them to do", flush=True)
        stopped = run_all(todo, plan, workers=options.workers, seconds=options.seconds)
    publish(folders, output)
    if stopped:
        print(f"Stopped by {stopped}; the same command goes on.")
        return 3
    return 1 if any(folder.failure for folder in folders if folder.result is None) else 0


def publish(folders: Sequence[RunFolder], output: Path) -> None:
    """Prints the tables, and writes them, the figures and the pictures."""
    rows = collect(folders)
    print(f"\n{page(rows, markdown=False)}\n")
    text = f"# Sweep\n\n{page(rows, markdown=True)}\n"
    if draw_pareto(rows, output / "pareto.png"):
        text += "\n![Loss against traffic](pareto.png)\n"
    if draw_curves(rows, output / "losses.png"):
        text += "\n![Training losses](losses.png)\n"
    write_atomically(output / "results.md", text)
    data = json.dumps([row.to_json() for row in rows], indent=1)
    write_atomically(output / "results.json", data + "\n")
    print(f"Written: {output / 'results.md'}, and results.json and pictures beside it.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep: exit code 2 and one line on stderr for a fault of the call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("list", type=Path, metavar="LIST.toml")
    add("--output", type=Path, required=True, metavar="DIR", help="where runs and results go")
    add("--data", type=Path, metavar="PREFIX", help="of a dataset of tools/prepare_data.py")
    add("--only", nargs="+", default=[], metavar="NAME", help="run these alone")
    add("--workers", type=int, default=1, metavar="N",
        help="runs at once, each on a GPU of its own (default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, metavar="S", help="stop after so long")
    add("--retry", action="store_true", help="try again what crashed, from its last checkpoint")
    add("--redo", nargs="+", default=[], metavar="NAME", help="delete and train anew")
    add("--report-only", action="store_true", help="tables and pictures of what is there")
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error(f"--workers {options.workers} must be at least 1")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g} must be positive")
    if options.report_only and (options.redo or options.retry):
        parser.error("--report-only runs nothing; leave --redo and --retry out")
    try:
        return sweep(options)
    except (SweepError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
