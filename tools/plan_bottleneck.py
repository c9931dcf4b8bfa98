# SPDX-License-Identifier: Apache-2.0
"""What holds a step up: computation, all links' bandwidth, or their latency, and where."""

from pipeline_simulation import BACK, ONWARD, simulated
from pipeline_step import Step

#: Gains that differ by less than this part of a step are alike.
_ALIKE = 1e-3

#: What is used for at least this part of the time of what is used most, is used as much.
_AS_MUCH = 0.98


def bottleneck(step: Step) -> str:
    """What would shorten the step most if it were twice as fast."""
    faster = {
        _computation: step.twice_as_fast(),
        _bandwidth: step.with_links(bandwidth=2.0),
        _latency: step.with_links(latency=0.5),
    }
    seconds = {say: simulated(other).seconds for say, other in faster.items()}
    limit = min(seconds.values()) + _ALIKE * simulated(step).seconds
    return next(say for say, least in seconds.items() if least <= limit)(step)


def _computation(step: Step) -> str:
    each = [step.computing(process) for process in range(step.processes)]
    if step.devices is not None or min(each) > _AS_MUCH * max(each):
        return "computation"
    return f"computation of stage {each.index(max(each))}"


def _bandwidth(step: Step) -> str:
    course = simulated(step)
    largest = max(course.busy.values())
    used = f"{largest / course.seconds:.0%} in use"
    widest = [key for key, seconds in course.busy.items() if seconds > _AS_MUCH * largest]
    if len(widest) > 1 and len(widest) >= len(step.links):
        return f"bandwidth of the links, {used}"
    return f"bandwidth from {_ends(step, *widest[0])}, {used}"


def _latency(step: Step) -> str:
    latencies = {
        (number, name): side.latency
        for number, link in enumerate(step.links)
        for name, side in ((ONWARD, link.onward), (BACK, link.back))
    }
    largest = max(latencies.values())
    widest = [key for key, latency in latencies.items() if latency > _AS_MUCH * largest]
    if len(widest) == len(latencies):
        return "latency of the links"
    return f"latency from {_ends(step, *widest[0])}"


def _ends(step: Step, link: int, direction: str) -> str:
    one, other = link, (link + 1) % step.processes
    return f"stage {one} to {other}" if direction == ONWARD else f"stage {other} to {one}"
