# SPDX-License-Identifier: Apache-2.0
"""Which ranks and codecs to use: the fastest measured settings that lose no more than they may."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mapl.plan import BoundaryPlan
from plan_job import Job
from plan_prediction import Machine, Prediction, predict
from plan_settings import Setting

#: Of settings whose steps differ by less than this part, the one that loses least is taken, and a
#: boundary stays uncompressed if that adds no more to the step. Predictions are not finer.
TOLERANCE = 0.02


#: Flags that a boundary may have for itself.
_OF_A_BOUNDARY = ("rank", "forward_codec", "backward_codec")

#: Setting of each link's boundaries: number of a boundary modulo processes → None: uncompressed.
_Mix = dict[int, Setting | None]


@dataclass(frozen=True)
class Recommendation:
    """What to train with.

    Attributes:
        prediction: of the job with it; plain Megatron's if nothing is worth compressing.
        boundaries: the measured setting of each boundary, None for those left uncompressed; empty
            for plain Megatron.
        budget: the largest gap that was allowed, percent.
        least: the smallest gap that was measured, None if nothing was that fits the job.
    """

    prediction: Prediction
    boundaries: tuple[Setting | None, ...]
    budget: float
    least: float | None

    @property
    def measured(self) -> Setting | None:
        """Of its settings the one that loses most, None for plain Megatron."""
        used = [setting for setting in self.boundaries if setting is not None]
        return max(used, key=_gap, default=None)

    @property
    def plan(self) -> BoundaryPlan | None:
        """The rank and the codecs of each boundary, None for plain Megatron."""
        return self.prediction.plan

    @property
    def command_line(self) -> str:
        """The flags to paste, the codecs always among them; nothing for plain Megatron."""
        setting = self.prediction.setting
        if (config := setting.config) is None:
            return ""
        named = {
            "rank": config.rank,
            "anchor": config.anchor,
            "forward_codec": config.forward_codec,
            "backward_codec": config.backward_codec,
        }
        return replace(setting, flags={**named, **setting.flags}).command_line


def recommend(
    job: Job, machine: Machine, settings: Sequence[Setting], budget: float
) -> Recommendation:
    """Chooses for each boundary.

    1. Predict every setting whose gap is within the budget, and plain Megatron.
    2. Take the fastest; of those about as fast, the one with the smallest gap.
    3. Leave uncompressed what may be: one boundary after the other, those first of which the step
       takes notice least, as long as it stays about as fast as with that setting everywhere.
    4. Give the boundaries of each remaining link, the fastest first, the measured setting of the
       smallest gap with which the step stays about as fast: of those that differ from the chosen
       one in rank and codecs alone, since projector and anchor are those of all boundaries.

    With virtual stages boundaries that are a pipeline apart go together, as Megatron's transfers
    ask for.

    Mixed settings and fewer compressed boundaries were not measured; they are taken to lose no more
    than the setting that loses most, at all boundaries.
    """
    plain = predict(job, Setting("uncompressed", {}, 0.0), machine)
    measured = [setting for setting in settings if setting.gap is not None]
    least = min(map(_gap, measured), default=None)
    allowed = [setting for setting in measured if _gap(setting) <= budget]
    candidates = [plain, *(predict(job, setting, machine) for setting in allowed)]
    limit = min(candidate.seconds for candidate in candidates) * (1 + TOLERANCE)
    close = [candidate for candidate in candidates if candidate.seconds <= limit]
    if plain in close:
        return Recommendation(plain, (), budget, least)
    chosen = min(close, key=lambda c: (_gap(c.setting), c.seconds))
    best, limit = chosen.setting, chosen.seconds * (1 + TOLERANCE)
    processes = job.pipeline_model_parallel_size
    mix: _Mix = {boundary % processes: best for boundary in range(job.boundaries)}
    if best.flags.get("projector") != "subspace":  # one subspace for all boundaries
        mix = _thinned(job, machine, mix, limit)
        mix = _loosened(job, machine, mix, _like(best, allowed), limit)
    prediction = _predicted(job, machine, mix)
    boundaries = tuple(mix[boundary % processes] for boundary in range(job.boundaries))
    return Recommendation(prediction, boundaries, budget, least)


def _gap(setting: Setting) -> float:
    assert setting.gap is not None, "it was measured"
    return setting.gap


def _thinned(job: Job, machine: Machine, mix: _Mix, limit: float) -> _Mix:
    """The same with as many uncompressed boundaries as do no harm."""
    compressed = list(mix)
    while len(compressed) > 1:
        seconds = {link: _predicted(job, machine, {**mix, link: None}).seconds
                   for link in compressed}  # fmt: skip
        link = min(compressed, key=lambda number: seconds[number])
        if seconds[link] > limit:
            break
        compressed.remove(link)
        mix = {**mix, link: None}
    return mix


def _loosened(
    job: Job, machine: Machine, mix: _Mix, settings: Sequence[Setting], limit: float
) -> _Mix:
    """The same with settings that lose less on links where they do no harm."""

    def speed(number: int) -> float:
        link = machine.links[number % len(machine.links)]
        return min(link.onward.bits_a_second, link.back.bits_a_second)

    for number in sorted(mix, key=speed, reverse=True):
        if (own := mix[number]) is None:
            continue
        for setting in sorted(settings, key=_gap):
            if _gap(setting) >= _gap(own):
                break
            if _predicted(job, machine, trial := {**mix, number: setting}).seconds <= limit:
                mix = trial
                break
    return mix


def _like(setting: Setting, others: Sequence[Setting]) -> list[Setting]:
    """Those that differ from a setting in the flags of a boundary alone."""
    common = _common(setting)
    return [other for other in others if _common(other) == common]


def _common(setting: Setting) -> dict[str, Any]:
    config = setting.config
    assert config is not None, "it compresses"
    return {name: value for name, value in vars(config).items() if name not in _OF_A_BOUNDARY}


def _predicted(job: Job, machine: Machine, mix: _Mix) -> Prediction:
    """With each boundary's rank and codecs; one of them for all where they are alike."""
    used = [setting for setting in mix.values() if setting is not None]
    worst = max(used, key=_gap)
    each = [mix[number % job.pipeline_model_parallel_size] for number in range(job.boundaries)]
    flags = dict(worst.flags)
    if None in each or len({setting.name for setting in used}) > 1:
        configs = [None if setting is None else setting.config for setting in each]
        flags["rank"] = [0 if config is None else config.rank[0] for config in configs]
        for name in _OF_A_BOUNDARY[1:]:
            codecs = [None if config is None else getattr(config, name)[0] for config in configs]
            if len({*codecs} - {None}) > 1:
                flags[name] = [codec or "pipeline" for codec in codecs]
    return predict(job, replace(worst, flags=flags), machine)
