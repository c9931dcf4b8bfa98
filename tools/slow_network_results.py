# SPDX-License-Identifier: Apache-2.0
"""What the slow-network bench measured, and what follows from it: figures, tables, JSON.

Times are medians over the timed steps. The byte ratio is (uncompressed bytes) / (all bytes sent),
both directions, counted by the runs themselves.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slow_network_plan import UNCOMPRESSED, Setting, Sizes, settings

#: The goals: speed-up as a part of the byte ratio, in a network where the uncompressed run spends
#: this share of its time on the wire; emulated against shaped link.
OF_RATIO, WIRE_SHARE, AGREEMENT = 0.8, 0.8, 0.1

#: A run whose step is shorter than this many steps on an unlimited link is bound by computation.
COMPUTE_BOUND = 1.25


@dataclass(frozen=True)
class Timing:
    """Steps of one setting at one bandwidth.

    Attributes:
        mbit: Mbit/s; None: as fast as the machine is.
        link: "shaped" or "emulated".
        steps: seconds of each timed step.
        link_bytes: a step's bytes on all links by the kernel's counters, headers, acknowledgements
            and Megatron's own messages included; None if they were not read.
        control_bytes: a step's bytes between stages that are not neighbours, which take no link.
    """

    setting: str
    mbit: float | None
    link: str
    steps: list[float]
    link_bytes: float | None = None
    control_bytes: float | None = None

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


@dataclass(frozen=True)
class Traffic:
    """Bytes a step, on average, as the run reports them.

    Attributes:
        sent: over all links, both directions.
        uncompressed: what plain Megatron would have sent for the same micro-batches.
        busiest: over one link in its busier direction.
    """

    sent: float
    uncompressed: float
    busiest: float

    @property
    def ratio(self) -> float:
        return self.uncompressed / self.sent


@dataclass
class Results:
    """All that one call of the bench has measured.

    Attributes:
        goodput: nominal Mbit/s → Mbit/s of payload that a connection carries both ways at once.
        curves: setting → (seconds since the end of the first step, loss) of each step.
        other_programs: setting → the share of the processors that others used meanwhile.
        failed: setting → why.
    """

    sizes: Sizes
    machine: dict[str, str]
    curve_mbit: float
    goodput: dict[float, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    other_programs: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def step(self, setting: str, mbit: float | None, link: str = "shaped") -> float | None:
        """Seconds of a step, None if it was not measured."""
        for timing in self.timings:
            if (timing.setting, timing.mbit, timing.link) == (setting, mbit, link):
                return timing.step
        return None

    def rows(self, mbit: float) -> "list[Row]":
        """The settings measured at a bandwidth."""
        base = self.step(UNCOMPRESSED, mbit)
        rows = []
        for timing in self.timings:
            if timing.mbit != mbit or timing.link != "shaped":
                continue
            traffic = self.traffic.get(timing.setting)
            unlimited = self.step(timing.setting, None)
            rows.append(
                Row(
                    setting=timing.setting,
                    step=timing.step,
                    fastest=min(timing.steps),
                    slowest=max(timing.steps),
                    tokens_per_second=self.sizes.step_tokens / timing.step,
                    sent=traffic.sent if traffic else None,
                    token_bytes=traffic.sent / self.sizes.link_tokens if traffic else None,
                    link_bytes=timing.link_bytes,
                    ratio=traffic.ratio if traffic else None,
                    speed_up=base and base / timing.step,
                    compute_share=unlimited and min(1.0, unlimited / timing.step),
                    floor=traffic.busiest * 8 / (mbit * 1e6) if traffic else None,
                )
            )
        return rows

    def to_json(self) -> str:
        """All figures, those that follow from others too."""
        data = dataclasses.asdict(self)
        data["goodput"] = [[mbit, measured] for mbit, measured in self.goodput.items()]
        data["tables"] = [
            {"mbit": mbit, "rows": [dataclasses.asdict(row) for row in self.rows(mbit)]}
            for mbit in self.goodput
        ]
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """What `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        return cls(
            sizes=Sizes(**data["sizes"]),
            machine=data["machine"],
            curve_mbit=data["curve_mbit"],
            goodput={mbit: measured for mbit, measured in data["goodput"]},
            timings=[Timing(**timing) for timing in data["timings"]],
            traffic={name: Traffic(**traffic) for name, traffic in data["traffic"].items()},
            curves={name: [(t, loss) for t, loss in c] for name, c in data["curves"].items()},
            other_programs=data["other_programs"],
            failed=data["failed"],
        )


@dataclass(frozen=True)
class Row:
    """One setting at one bandwidth. None: not known.

    Attributes:
        step, fastest, slowest: seconds of a timed step: median and extremes.
        sent, link_bytes, ratio: see Timing and Traffic.
        token_bytes: sent for each token over each link, both directions together.
        speed_up: over the uncompressed run's step.
        compute_share: its step on an unlimited link, as a share of this step.
        floor: seconds that a step's bytes take at the least, in the busiest direction of a link.
    """

    setting: str
    step: float
    fastest: float
    slowest: float
    tokens_per_second: float
    sent: float | None
    token_bytes: float | None
    link_bytes: float | None
    ratio: float | None
    speed_up: float | None
    compute_share: float | None
    floor: float | None

    @property
    def of_ratio(self) -> float | None:
        """How much of the byte ratio became speed."""
        return self.speed_up / self.ratio if self.speed_up and self.ratio else None

    @property
    def compute_bound(self) -> bool:
        return self.compute_share is not None and self.compute_share * COMPUTE_BOUND > 1


def wire_share(results: Results, mbit: float) -> float | None:
    """The share of the uncompressed run's step that it would not need on an unlimited link."""
    slow, unlimited = results.step(UNCOMPRESSED, mbit), results.step(UNCOMPRESSED, None)
    return max(0.0, 1 - unlimited / slow) if slow and unlimited else None


def hiding(results: Results) -> list[tuple[str, float | None, float, float]]:
    """Latency hiding: setting, bandwidth, seconds of a step without it, and with it."""
    found = []
    for setting in settings(results.sizes.hidden):
        if setting.without_hiding is None:
            continue
        for timing in _shaped(results, setting):
            without = results.step(setting.without_hiding, timing.mbit)
            if without is not None:
                found.append((setting.name, timing.mbit, without, timing.step))
    return found


def agreement(results: Results) -> list[tuple[str, float, float, float]]:
    """Emulated and shaped links: setting, bandwidth, seconds of a step shaped, and emulated."""
    return [
        (timing.setting, timing.mbit, shaped, timing.step)
        for timing in results.timings
        if timing.link == "emulated" and timing.mbit is not None
        if (shaped := results.step(timing.setting, timing.mbit)) is not None
    ]


def _shaped(results: Results, setting: Setting) -> Sequence[Timing]:
    return [t for t in results.timings if (t.setting, t.link) == (setting.name, "shaped")]
