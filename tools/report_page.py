# SPDX-License-Identifier: Apache-2.0
"""The page of report.py: one HTML file that needs no other, and its pictures beside it."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

import report_geometry
import report_measured
import report_totals
import report_training
from mapl.files import write_atomically
from report_pictures import colours
from report_runs import Recorded
from report_sections import Section

_TEMPLATE = "report.html.jinja"

# Title → what a run needs to have such data, in the page's order.
_NEEDS = {
    "Losses": "lines of losses",
    "Traffic": "--mapl-rank, and a save or an end",
    "Time on the wire": "--mapl-rank",
    "Energy kept": "projectors",
    "Orthogonality": "projectors",
    "Angles between neighbours": "projectors at both ends of a stage",
    "Codebook use": "the codec rvq",
    "Geometry": "--mapl-geometry-interval",
}


def write(runs: Sequence[Recorded], paths: Sequence[Path], output: Path) -> Path:
    """Write the page, whole or not at all, and before it each picture.

    Args:
        runs: what to compare.
        paths: where each was read from.
        output: the page's file.

    Returns:
        The folder of the pictures: that of the page, with its name and "-figures".

    Raises:
        ReportError: geometry is damaged.
    """
    measured = {}
    for recorded, path in zip(runs, paths, strict=True):
        if recorded.has_geometry:
            name = recorded.run.name
            measured[name] = report_geometry.load(path, name)
    found = [
        report_totals.losses(runs),
        report_totals.traffic(runs),
        report_training.time(runs),
        report_training.energy(runs),
        report_training.orthogonality(runs),
        report_training.angles(runs),
        report_training.codebooks(runs),
        report_measured.geometry(runs, measured),
    ]
    sections = [section for section in found if section]
    folder = output.with_name(f"{output.stem}-figures")
    for section in sections:
        for picture in section.pictures:
            write_atomically(folder / f"{picture.name}.png", picture.content)
    write_atomically(output, render(runs, paths, sections))
    return folder


def render(runs: Sequence[Recorded], paths: Sequence[Path], sections: Sequence[Section]) -> str:
    """The page as text; names of runs and all else are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    titles = [section.title for section in sections]
    return environment.get_template(_TEMPLATE).render(
        runs=[(recorded.run, path) for recorded, path in zip(runs, paths, strict=True)],
        colours=colours([recorded.run for recorded in runs]),
        sections=sections,
        absent=[(title, needs) for title, needs in _NEEDS.items() if title not in titles],
    )


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
