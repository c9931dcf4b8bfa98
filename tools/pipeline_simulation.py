# SPDX-License-Identifier: Apache-2.0
"""One training step of a Megatron pipeline over given links, simulated.

Follows megatron-core 0.19's two 1F1B schedules (`core/pipeline_parallel/schedules.py`): what each
process computes, what it posts and what it waits for, in that order (`pipeline_1f1b.py`,
`pipeline_interleaved.py`). With links that cost nothing and equal stages the step takes

    (P − 1 + m) · (t_f + t_b)            without virtual stages
    ((P − 1) / V + m) · (t_f + t_b)      with V chunks of the model in each process

for m micro-batches and P processes, and the bubble is (P − 1) / m, or (P − 1) / (m V).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

from event_messages import Way
from event_simulation import Simulation
from pipeline_1f1b import one_forward_one_backward
from pipeline_interleaved import interleaved
from pipeline_stage import BACKWARD, FORWARD, STEP_BACK, STEP_ONWARD, Stage
from pipeline_step import Step

#: The directions of a link: to the next process, and to the one before.
ONWARD, BACK = "onward", "back"


@dataclass(frozen=True)
class Course:
    """How a step went.

    Attributes:
        seconds: of the step.
        bubble: seconds beyond those that the computation takes at the least, over these. Equal
            stages over links that cost nothing have (P − 1) / m.
        busy: (link, ONWARD or BACK) → seconds for which messages occupied it.
    """

    seconds: float
    bubble: float
    busy: dict[tuple[int, str], float]


def simulate(step: Step) -> Course:
    """Runs the step.

    Raises:
        RuntimeError: the schedule comes to no end, with micro-batches that it cannot run.
    """
    ways: dict[tuple[int, str], Way] = {}
    for number, link in enumerate(step.links):
        for name, side in ((ONWARD, link.onward), (BACK, link.back)):
            ways[number, name] = Way(8 / side.bits_a_second, side.latency)
    between = [(ways[number, ONWARD], ways[number, BACK]) for number in range(len(step.links))]
    if step.processes == 2:  # from the last to the first it is the same link, the other way round
        between.append(between[0][::-1])
    channels: dict[Hashable, tuple[Way, Way]] = {}
    for number, (onward, back) in enumerate(between):
        for kind in (FORWARD, STEP_ONWARD):
            channels[kind, number] = onward, back
        for kind in (BACKWARD, STEP_BACK):
            channels[kind, number] = back, onward
    simulation = Simulation(
        channels, step.devices or step.processes, words_queue=step.backend == "gloo"
    )
    schedule = interleaved if step.virtual_stages > 1 else one_forward_one_backward
    stages = [Stage(simulation, step, process) for process in range(step.processes)]
    ends = simulation.run([schedule(stage) for stage in stages])
    floor = step.compute_floor
    bubble = max(ends) / floor - 1 if floor else float("inf")
    return Course(max(ends), bubble, {key: way.busy for key, way in ways.items()})


#: The same for steps that come again.
simulated = lru_cache(maxsize=None)(simulate)
