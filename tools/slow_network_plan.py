# SPDX-License-Identifier: Apache-2.0
"""What the slow-network bench trains: the model, the settings that it compares, and for how long.

Everything that one may want to change stands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The model and its batches: one layer a stage, and the last stage has the output alone.

    Little is computed for each byte that is sent, so that the network dominates: few heads, a
    narrow MLP, a small vocabulary, and a last stage that the others need not wait for.
    """

    stages: int = 4
    hidden: int = 256
    sequence: int = 256
    micro_batch: int = 4  # sequences
    micro_batches: int = 6  # a step

    @property
    def step_tokens(self) -> int:
        return self.sequence * self.micro_batch * self.micro_batches

    @property
    def link_tokens(self) -> int:
        """A step's tokens, each as often as it crosses a link and comes back."""
        return self.step_tokens * (self.stages - 1)

    @property
    def payload_bytes(self) -> int:
        """A micro-batch's activations, uncompressed: bf16."""
        return self.sequence * self.micro_batch * self.hidden * 2

    @property
    def step_bytes(self) -> int:
        """What a step sends uncompressed, over all links in both directions."""
        return (self.stages - 1) * 2 * self.micro_batches * self.payload_bytes

    def flags(self) -> list[str]:
        """Megatron's flags for the model and its training."""
        return (
            f"--num-layers {self.stages - 1} --account-for-loss-in-pipeline-split "
            f"--pipeline-model-parallel-size {self.stages} "
            f"--hidden-size {self.hidden} --ffn-hidden-size {self.hidden} "
            f"--num-attention-heads {max(1, self.hidden // 128)} --seq-length {self.sequence} "
            f"--max-position-embeddings {self.sequence} --position-embedding-type rope "
            "--swiglu --normalization RMSNorm --disable-bias-linear "
            "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
            f"--micro-batch-size {self.micro_batch} "
            f"--global-batch-size {self.micro_batch * self.micro_batches} --bf16 "
            "--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "
            # The number of steps is not known beforehand: nothing may depend on it.
            "--lr 1e-3 --lr-decay-style constant --lr-warmup-iters 4 --train-iters 5000 "
            "--log-interval 1 --eval-iters 0 --eval-interval 5000 --num-workers 0 "
            "--exit-signal-handler"
        ).split()


@dataclass(frozen=True)
class Setting:
    """One way to train, compared with the others.

    Attributes:
        name: in tables and pictures.
        flags: beside those of the model.
        ratio: how many times fewer bytes, roughly; only to plan the time. The bench measures it.
        quick: whether it is part of the quick bench.
        curve: whether it trains long enough at one bandwidth for a loss curve.
        emulate: whether it also runs over loopback with `--mapl-emulate-bandwidth`, the lowest.
        few: whether one bandwidth, the lowest, is enough.
        without_hiding: the name of the setting that differs in receiving nothing ahead.
    """

    name: str
    flags: str
    ratio: float
    quick: bool = False
    curve: bool = False
    emulate: bool = False
    few: bool = False
    without_hiding: str | None = None


UNCOMPRESSED = "uncompressed"


def settings(hidden: int) -> list[Setting]:
    """All settings for a model of width d; the first is what the others are compared with."""
    direct = f"--mapl-rank {hidden} --mapl-projector none --mapl-anchor none"
    through = f"{direct} {_codec('pipeline')}"
    factorized = "--mapl-anchor factorized --mapl-projector-exchange fp32"
    projected = {part: f"{factorized} --mapl-rank {hidden // part}" for part in (4, 8)}
    quarter, eighth = (f"{flags} {_codec('pipeline')}" for flags in projected.values())
    return [
        Setting(UNCOMPRESSED, "", 1, quick=True, curve=True, emulate=True),
        Setting("direct int8", f"{direct} {_codec('int8')}", 1.9),
        Setting("direct int4", f"{direct} {_codec('int4')}", 3.6, quick=True, curve=True),
        Setting("MAPL d/4", quarter, 3.8, emulate=True,
                without_hiding="MAPL d/4, none ahead"),
        Setting("MAPL d/8", eighth, 7.5, quick=True, curve=True),
        Setting("MAPL d/4 int8", f"{projected[4]} {_codec('int8')}", 7, emulate=True),
        Setting("MAPL d/4 int4", f"{projected[4]} {_codec('int4')}", 11),
        Setting("MAPL d/8 int8", f"{projected[8]} {_codec('int8')}", 13, quick=True, curve=True),
        Setting("MAPL d/8 rvq", f"{projected[8]} {_codec('rvq')}", 17),
        Setting("MAPL d/4, none ahead", f"{quarter} --mapl-receive-ahead 0", 3.8, few=True),
        Setting("through MAPL", through, 1, few=True, without_hiding="through MAPL, none ahead"),
        Setting("through MAPL, none ahead", f"{through} --mapl-receive-ahead 0", 1, few=True),
    ]  # fmt: skip


def _codec(name: str) -> str:
    return f"--mapl-forward-codec {name} --mapl-backward-codec {name}"


@dataclass(frozen=True)
class Phase:
    """A part of a job at one bandwidth.

    Attributes:
        mbit: Mbit/s of each direction of each link; None: as fast as the machine is.
        discard: steps that are not timed, because something is new: the job, or the bandwidth.
        steps: timed steps, at least.
        seconds: of timed steps, at least.
    """

    mbit: float | None
    discard: int
    steps: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        bandwidths: in Mbit/s, ascending.
        curve_mbit: the bandwidth of the loss curves.
        curve_steps: steps of the uncompressed loss curve; the others get the same time.
        target: seconds of timed steps that a bandwidth is given, within `least` and `most` steps.
    """

    bandwidths: tuple[float, ...] = (5, 15, 60)
    curve_mbit: float = 15
    curve_steps: int = 10
    target: float = 12.0
    least: int = 3
    most: int = 8

    @property
    def lowest(self) -> float:
        """The bandwidth at which the network dominates most."""
        return self.bandwidths[0]


QUICK = Effort(bandwidths=(15, 60), curve_mbit=15, curve_steps=6, target=4, least=2, most=4)

#: Seconds, roughly, on two cores, to plan with: four processes that import Megatron; a step's
#: computation for a token.
START_UP = 20.0
_COMPUTE = 1e-4


def expected_step(sizes: Sizes, setting: Setting, mbit: float | None) -> float:
    """Seconds of a step, roughly, where each transfer is waited for."""
    compute = sizes.step_tokens * _COMPUTE
    if mbit is None:
        return compute
    transfer = sizes.payload_bytes * 8 / setting.ratio / (mbit * 1e6)
    return compute + 2.5 * (sizes.micro_batches + sizes.stages - 1) * transfer


def phases(
    sizes: Sizes, setting: Setting, effort: Effort, curve_seconds: float | None
) -> list[Phase]:
    """One job for all bandwidths: a start takes longer than most measurements.

    Args:
        curve_seconds: for a loss curve; None, for the setting that sets the time for the others.
    """

    def timed(mbit: float | None, discard: int) -> Phase:
        steps = round(effort.target / expected_step(sizes, setting, mbit))
        return Phase(mbit, discard, max(effort.least, min(steps, effort.most)))

    planned: list[Phase] = []
    bandwidths = (effort.lowest,) if setting.few else effort.bandwidths
    rest: list[float | None] = [None, *sorted(bandwidths, reverse=True)]
    if setting.curve:
        rest.remove(effort.curve_mbit)
        steps = effort.curve_steps if curve_seconds is None else effort.least
        planned.append(Phase(effort.curve_mbit, 2, steps, curve_seconds or 0.0))
    for mbit in rest:
        planned.append(timed(mbit, 1 if planned else 2))
    return planned


def expected_seconds(sizes: Sizes, setting: Setting, planned: Sequence[Phase]) -> float:
    """Of a whole job, roughly."""
    total = START_UP
    for phase in planned:
        step = expected_step(sizes, setting, phase.mbit)
        total += max((phase.discard + phase.steps) * step, phase.discard * step + phase.seconds)
    return total
