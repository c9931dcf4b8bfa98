# SPDX-License-Identifier: Apache-2.0
"""The parallel layouts that boundaries must work in, as arguments of pretrain_gpt.py."""

from dataclasses import dataclass
from itertools import pairwise

from mapl.config import LEARNED, MaplConfig

HIDDEN, SEQUENCE = 64, 32

MODEL = (
    f"--num-layers 4 --hidden-size {HIDDEN} --num-attention-heads 4 "
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 4 "
    "--lr 3e-3 --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 255 --log-interval 1 --eval-iters 1 "
    "--eval-interval 100 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0 "
    "--attention-dropout 0 --split 90,5,5 --num-workers 0"
).split()


#: Unless a test says otherwise. A codec's rounding would hide what most of them look at.
PLAIN_BOUNDARIES = {
    "--mapl-anchor": "factorized",
    "--mapl-forward-codec": "pipeline",
    "--mapl-backward-codec": "pipeline",
    "--mapl-projector-exchange": "fp32",
}


def with_plain_boundaries(command: list[str]) -> list[str]:
    """The command line with `PLAIN_BOUNDARIES`, but for what it says itself."""
    missing = [flag for flag in PLAIN_BOUNDARIES if flag not in command]
    if "--mapl-rank" not in command:
        return command
    if not _exchanges(command):
        missing = [flag for flag in missing if flag != "--mapl-projector-exchange"]
    plain = [word for flag in missing for word in (flag, PLAIN_BOUNDARIES[flag])]
    return [*plain, *command]  # so that a test may add to the end


def _exchanges(command: list[str]) -> bool:
    """Whether the two sides of a boundary send each other anything of the projector's."""
    learns = _value(command, "--mapl-projector", MaplConfig.projector) in LEARNED
    return learns or "--mapl-projector-start-step" in command


def _value(command: list[str], flag: str, default: str) -> str:
    """What a flag is set to: the last of several values wins."""
    return [default, *(after for word, after in pairwise(command) if word == flag)][-1]


@dataclass(frozen=True)
class Layout:
    """One way to spread the model.

    Attributes:
        world_size: processes.
        arguments: beside MODEL; a later value of a flag wins.
        without: flags of MODEL to leave out.
    """

    world_size: int
    arguments: str
    without: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """The number of samples of a step."""
        return self._size("--global-batch-size")

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of a step in each replica."""
        replicas = self.processes_a_stage // self._size("--tensor-model-parallel-size")
        return self.samples // self._size("--micro-batch-size") // replicas

    @property
    def processes_a_stage(self) -> int:
        """Replicas and tensor-parallel ranks that hold each stage."""
        return self.world_size // self._size("--pipeline-model-parallel-size")

    @property
    def boundaries(self) -> int:
        """Those between all stages, virtual ones included."""
        stages = self._size("--pipeline-model-parallel-size")
        return stages * self._size("--num-virtual-stages-per-pipeline-rank") - 1

    def _size(self, flag: str) -> int:
        """What a flag is set to, 1 if it is not."""
        return int(_value(self.bare_command(), flag, "1"))

    def command(self, *more: str) -> list[str]:
        """The whole command line, with `PLAIN_BOUNDARIES` unless it has its own."""
        return with_plain_boundaries(self.bare_command(*more))

    def bare_command(self, *more: str) -> list[str]:
        """The same with the defaults of a user's command line."""
        kept = [argument for argument in MODEL if argument not in self.without]
        return [*kept, *self.arguments.split(), *" ".join(more).split()]


PP2 = "--pipeline-model-parallel-size 2"
PP4 = "--pipeline-model-parallel-size 4"
VPP = "--num-virtual-stages-per-pipeline-rank 2"
DIST_OPT = "--use-distributed-optimizer"
#: Of four micro-batches each. With one alone no group would follow another, and the first two of
#: four stages with virtual stages would never leave the warm-up.
TWO_GROUPS = "--global-batch-size 16"

LAYOUTS = {
    "pp2": Layout(2, PP2),
    "pp4": Layout(4, PP4),
    "pp2-vpp2-flush": Layout(2, f"{PP2} --overlap-p2p-communication-warmup-flush {VPP}"),
    "pp2-vpp2-overlapped": Layout(2, f"{PP2} {VPP}"),
    "pp2-vpp2-group4": Layout(
        2, f"{PP2} {VPP} --microbatch-group-size-per-virtual-pipeline-stage 4 {TWO_GROUPS}"
    ),
    "pp4-vpp2": Layout(
        4, f"{PP4} {VPP} --no-overlap-p2p-communication --num-layers 8 {TWO_GROUPS}"
    ),
    "tp2-pp2": Layout(4, f"{PP2} --tensor-model-parallel-size 2"),
    "tp2-sp-pp2": Layout(4, f"{PP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-dp2": Layout(4, PP2),
    "pp2-dp2-distributed-optimizer": Layout(4, f"{PP2} {DIST_OPT}"),
    "pp2-dp2-distributed-optimizer-overlaps": Layout(
        4, f"{PP2} {DIST_OPT} --overlap-grad-reduce --overlap-param-gather"
    ),
    "bf16": Layout(2, f"{PP2} --bf16 {DIST_OPT}"),
    "fp16": Layout(2, f"{PP2} --fp16 --initial-loss-scale 4294967296 --train-iters 18"),
    # Newton-Schulz in bf16, Muon's default, would turn the last digits of a gradient into others.
    "muon": Layout(2, f"{PP2} --optimizer muon --muon-fp32-matmul-prec high"),
    "per-token-loss": Layout(4, f"{PP2} --calculate-per-token-loss"),
    "moe-ep2": Layout(
        4,
        f"{PP2} --num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
        "--moe-token-dispatcher-type alltoall",
    ),
    "mtp": Layout(2, f"{PP2} --mtp-num-layers 1"),
    "tied-embeddings": Layout(2, PP2, without=("--untie-embeddings-and-output-weights",)),
    "full-recompute": Layout(
        2, f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
}
