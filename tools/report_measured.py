# SPDX-License-Identifier: Apache-2.0
"""The section of the page about geometry."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import report_geometry
from report_curves import pens
from report_geometry import Measured
from report_runs import Recorded
from report_sections import Section, Table, names_without, panel
from report_text import figure


def geometry(runs: Sequence[Recorded], measured: dict[str, Measured]) -> Section | None:
    """What docs/geometry.md explains, of runs that measured it."""
    places = [place for place, recorded in enumerate(runs) if recorded.run.name in measured]
    known = [runs[place] for place in places]
    if not known:
        return None
    drawn = pens([measured[recorded.run.name] for recorded in known], places)
    rows = [
        [m.name, str(b), str(m.ranks[b])]
        + [figure(c[b][-1], ".3f") for c in (m.kept, m.ceiling, m.random)]
        + [figure(m.rank_99[b][-1], ".1f"), figure(m.pearson[b][-1], ".4f")]
        for m, _ in drawn
        for b in sorted(m.ranks)
    ]
    seen = "; the table has the last figures."
    shown = [
        panel("geometry-energy", f"Energy kept, its ceiling and its chance level by step{seen}",
              lambda axes: report_geometry.draw_energy(axes, drawn)),
        panel("geometry-pearson", f"Pearson correlation of cosines by step{seen}",
              lambda axes: report_geometry.draw_pearson(axes, drawn), legend=False),
        panel("geometry-rank", f"Rank that holds 99% of the energy by step{seen}",
              lambda axes: report_geometry.draw_rank(axes, drawn), legend=False),
    ]  # fmt: skip
    for number, (m, _) in enumerate(drawn, start=1):
        told = "; ".join(f"{p} and {q} {a:.1f}°" for (p, q), a in sorted(m.angles.items()))
        shown.append(
            panel(f"geometry-angles-{number}",
                  f"Mean principal angles of {m.name} between boundaries: {told or 'one alone'}.",
                  partial(_draw_angles, run=m),
                  legend=False)
        )  # fmt: skip
    names = ["run", "boundary", "r", "energy kept", "ceiling", "random", "rank 99%", "Pearson"]
    text = (
        "What the projectors keep, in the steps that measured it: the energy beside that "
        "of the best subspace of rank r and of a random one, the rank that holds 99% of it, the "
        "correlation of tokens' cosines before and after projection, and angles between all pairs "
        "of boundaries."
    )
    return Section(
        "geometry", "Geometry", text, names_without(runs, known), shown,
        [Table("Geometry at the last step measured", names, rows, headings=2)],
    )  # fmt: skip


def _draw_angles(axes: Any, run: Measured) -> None:
    axes.figure.set_layout_engine("compressed")  # or a square map stands at the right
    report_geometry.draw_angles(axes, run, of_several=True)
