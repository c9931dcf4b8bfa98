# SPDX-License-Identifier: Apache-2.0
"""Compare what runs report: losses, traffic, time, projectors and codebooks.

    python tools/report.py RUN [RUN ...] [--output report.html]
    python tools/report.py RUN [RUN ...] --output report.png [--geometry geometry.png]

RUN is a --mapl-report-dir, with mapl_traffic.json and mapl_metrics.jsonl in it, a directory of
TensorBoard, which may be the same, or the log of a training. A name in .html gets one page that
needs no other file, and its pictures in a folder beside it; one in .png losses and traffic alone.
--geometry draws what the projectors keep, of runs with --mapl-geometry-interval (docs/geometry.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import report_geometry
import report_page
from cli import Parser, run
from report_files import ReportError
from report_pictures import draw
from report_runs import load_all, table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write page or pictures; a fault is one line on stderr and exit code 2."""
    options = _parse(argv)
    return run(
        "report.py",
        lambda: _report(options.runs, options.output, options.geometry),
        faults=ReportError,
        output=f"--output {options.output}",
        interrupted="what is already written is whole; start again for the rest",
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("report.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    parser.add_argument(
        "--geometry", type=Path, help="a second picture, of the projectors; default: none"
    )
    options = parser.parse_args(argv)
    if options.output.suffix not in (".html", ".png"):
        parser.error(
            f"--output {options.output} is neither a page nor a picture; give a name that ends in "
            ".html or .png"
        )
    return options


def _report(paths: Sequence[Path], output: Path, geometry: Path | None) -> None:
    """What `main` does with good arguments.

    Raises:
        ReportError: a run is missing or damaged.
    """
    recorded = load_all(paths)
    runs = [own.run for own in recorded]
    measured = [
        report_geometry.load(path, own.run.name)
        for path, own in zip(paths, recorded, strict=True)
        if geometry
    ]
    print(table(runs))
    if output.suffix == ".html":
        folder = report_page.write(recorded, paths, output)
        drawn = f"written in {output}, its pictures also in {folder}"
    else:
        draw(runs, output)
        drawn = f"drawn in {output}"
    if geometry:
        report_geometry.draw(measured, geometry)
        drawn += f" and {geometry}"
    print(drawn)


if __name__ == "__main__":
    sys.exit(main())
