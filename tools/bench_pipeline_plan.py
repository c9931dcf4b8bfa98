# SPDX-License-Identifier: Apache-2.0
"""What the pipeline bench trains: the model, how it is spread, the settings that it compares."""

from dataclasses import dataclass

from mapl.anchors import default_buckets
from mapl.memory import Stage, added, in_flight


@dataclass(frozen=True)
class Model:
    """A LLaMA and its batches; by default one of 1.14·10⁹ parameters."""

    layers: int = 20
    hidden: int = 2048
    ffn: int = 5504
    heads: int = 16
    sequence: int = 2048
    vocabulary: int = 32000
    micro_batch: int = 2  # sequences
    micro_batches: int = 8  # a step
    rank: int = 256

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.micro_batch * self.micro_batches

    @property
    def parameters(self) -> int:
        """All of them: embedding, output, and 4d² + 3·d·ffn + 2d a layer."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def flops_a_token(self) -> int:
        """6 N + 12 L d s: forward and backward, nothing recomputed, no boundary counted.

        N without the embedding, which is looked up. Attention counts whole, as is customary,
        though half of it is masked.
        """
        multiplied = self.parameters - self.vocabulary * self.hidden
        return 6 * multiplied + 12 * self.layers * self.hidden * self.sequence

    def flags(self, steps: int) -> list[str]:
        """Megatron's flags."""
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} "
            f"--ffn-hidden-size {self.ffn} --num-attention-heads {self.heads} "
            f"--seq-length {self.sequence} --max-position-embeddings {self.sequence} "
            "--position-embedding-type rope --swiglu --normalization RMSNorm "
            "--disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0 "
            f"--attention-dropout 0 --micro-batch-size {self.micro_batch} "
            f"--global-batch-size {self.micro_batch * self.micro_batches} --bf16 "
            f"--train-iters {steps} --lr 1e-4 --lr-decay-style constant --weight-decay 0.1 "
            "--clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer "
            f"--vocab-size {self.vocabulary - 1} --log-interval 1000 --eval-iters 0 "
            "--eval-interval 100000 --split 100,0,0 --num-workers 1 "
            "--distributed-timeout-minutes 3"
        ).split()


#: For a look at the bench itself, on any machine.
TINY = Model(
    layers=4,
    hidden=64,
    ffn=128,
    heads=4,
    sequence=32,
    vocabulary=256,
    micro_batches=4,
    rank=16,
)


@dataclass(frozen=True)
class Layout:
    """How the model is spread.

    Attributes:
        processes, gpus: how many.
        flags: Megatron's.
        backend: None for a layout without a pipeline.
        chunks: of the model in each process.
    """

    processes: int
    gpus: int
    flags: str = ""
    backend: str | None = None
    chunks: int = 1


def _pipeline(size: int) -> str:
    return f"--pipeline-model-parallel-size {size}"


LAYOUTS = {
    "single": Layout(1, 1),
    "gloo-pp2": Layout(2, 1, _pipeline(2), "gloo"),
    "gloo-pp4": Layout(4, 1, _pipeline(4), "gloo"),
    "nccl-pp2": Layout(2, 2, _pipeline(2), "nccl"),
    "nccl-pp2-vpp2": Layout(
        2, 2, f"{_pipeline(2)} --num-virtual-stages-per-pipeline-rank 2", "nccl", 2
    ),
}

#: What the others are compared with.
PLAIN = "plain"
#: What --mapl-rank alone gives, with bigram anchors.
DEFAULTS = "defaults"
#: Uncompressed, but as MAPL sends it.
UNPROJECTED = "payloads"


def settings(model: Model) -> dict[str, list[str]]:
    """Name → flags; the first is plain Megatron."""
    mapl = f"--mapl-rank {model.rank} --mapl-anchor factorized"
    through = f"--mapl-rank {model.hidden} --mapl-projector none --mapl-anchor none"
    plain_codec = _codec("pipeline", "pipeline")
    flags = {
        PLAIN: "",
        UNPROJECTED: f"{through} {plain_codec}",
        "mapl": f"{mapl} {plain_codec}",
        **{name: f"{mapl} {_codec(name, name)}" for name in ("int8", "int4", "fp8")},
        "rvq": f"{mapl} {_codec('rvq', 'int8')}",
        DEFAULTS: f"--mapl-rank {model.rank}",
    }
    return {name: text.split() for name, text in flags.items()}


def formula(model: Model, layout: Layout, process: int, setting: str) -> int:
    """Bytes that boundaries add to the memory of a process of the pipeline, at most."""
    stage = Stage(
        hidden_size=model.hidden,
        rank=model.rank,
        anchor_rank=model.hidden // 4,
        vocab_size=model.vocabulary,
        tokens=model.sequence * model.micro_batch,
        sending=layout.chunks - (process == layout.processes - 1),
        receiving=layout.chunks - (process == 0),
        in_flight=in_flight(layout.processes, process, model.micro_batches, layout.chunks),
        ahead=2 if layout.backend == "gloo" else 0,
        buckets=default_buckets(model.vocabulary) if setting == DEFAULTS else 0,
    )
    return sum(added(stage).values())


def _codec(forward: str, backward: str) -> str:
    return f"--mapl-forward-codec {forward} --mapl-backward-codec {backward}"
