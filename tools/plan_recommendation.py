# SPDX-License-Identifier: Apache-2.0
"""Which ranks and codecs to use: the fastest measured setting that loses no more than it may."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mapl.plan import BoundaryPlan
from plan_job import Job
from plan_prediction import Machine, Prediction, predict
from plan_settings import Setting

#: Of settings whose steps differ by less than this part, the one that loses least is taken, and a
#: boundary stays uncompressed if that adds no more to the step. Predictions are not finer.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Recommendation:
    """What to train with.

    Attributes:
        prediction: of the job with it; plain Megatron's if nothing is worth compressing.
        measured: the setting that its gap was measured with, None for plain Megatron.
        budget: the largest gap that was allowed, percent.
    """

    prediction: Prediction
    measured: Setting | None
    budget: float

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
       takes notice least, as long as it does not become longer. With virtual stages the boundaries
       of one link go together.

    A gap with fewer compressed boundaries was not measured; it is taken to be no larger.
    """
    plain = predict(job, Setting("uncompressed", {}, 0.0), machine)
    allowed = [s for s in settings if s.gap is not None and s.gap <= budget]
    candidates = [plain, *(predict(job, setting, machine) for setting in allowed)]
    fastest = min(candidate.seconds for candidate in candidates)
    close = [c for c in candidates if c.seconds <= fastest * (1 + TOLERANCE)]
    if plain in close:
        return Recommendation(plain, None, budget)
    best = min(close, key=lambda c: (c.setting.gap, c.seconds))
    return Recommendation(_thinned(job, machine, best), best.setting, budget)


def _thinned(job: Job, machine: Machine, best: Prediction) -> Prediction:
    """The same with as many uncompressed boundaries as do no harm."""
    if best.setting.flags.get("projector") == "subspace":
        return best  # one subspace for all boundaries
    processes = job.pipeline_model_parallel_size
    limit = best.seconds * (1 + TOLERANCE)
    compressed = {boundary % processes for boundary in range(job.boundaries)}
    chosen = best
    while len(compressed) > 1:
        trials = {link: _without(job, machine, best, compressed - {link}) for link in compressed}
        link = min(trials, key=lambda number: trials[number].seconds)
        if trials[link].seconds > limit:
            break
        compressed.remove(link)
        chosen = trials[link]
    return chosen


def _without(job: Job, machine: Machine, best: Prediction, compressed: set[int]) -> Prediction:
    """The setting with a rank on these links alone."""
    (rank,) = best.setting.flags["rank"]
    processes = job.pipeline_model_parallel_size
    ranks = [rank * (boundary % processes in compressed) for boundary in range(job.boundaries)]
    setting = replace(best.setting, flags={**best.setting.flags, "rank": ranks})
    return predict(job, setting, machine)
