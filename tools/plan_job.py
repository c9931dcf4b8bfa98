# SPDX-License-Identifier: Apache-2.0
"""The job that is planned: Megatron's flags for the model and its pipeline, and what they compute.

Floating-point operations of a training step are counted as Megatron's own
`num_floating_point_operations` does (a test holds them against each other): per token and layer

    6 d k (2 a + 2 g)  +  6 a k s  +  6 d f · (3 with SwiGLU, else 2)

with a heads of k numbers, g groups of keys and values, f the MLP's width, s the context (attention
under a causal mask), and 6 d V for the output. A third of them is forward. Nothing else is counted:
neither the optimizer nor the embedding, which is looked up.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Job:
    """A dense GPT model in a pipeline; the fields are named as Megatron's flags.

    `global_batch_size` is that of one data-parallel replica.

    Raises:
        ValueError: sizes that do not fit each other; names the flag, its value and the remedy.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    micro_batch_size: int
    global_batch_size: int
    pipeline_model_parallel_size: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    swiglu: bool = False
    num_virtual_stages_per_pipeline_rank: int = 1
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    make_vocab_size_divisible_by: int = 128
    distributed_backend: str = "nccl"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{_flag(name)} {value} must be at least 1")
        if self.pipeline_model_parallel_size < 2:
            raise ValueError(
                "--pipeline-model-parallel-size 1 has no link between stages to plan for; give 2 "
                "or more"
            )
        self._divides("hidden_size", "num_attention_heads", self.kv_channels is None)
        if self.num_query_groups is not None:
            self._divides("num_attention_heads", "num_query_groups")
        self._divides("global_batch_size", "micro_batch_size")
        self._divides("seq_length", "tensor_model_parallel_size", self.sequence_parallel)
        chunks = self.chunks
        if (self._counted_layers) % chunks or self._counted_layers < chunks:
            raise ValueError(
                f"--num-layers {self.num_layers} (with what --account-for-*-in-pipeline-split "
                f"adds: {self._counted_layers}) cannot be spread evenly over {chunks} stages; give "
                f"a multiple of {chunks}"
            )
        virtual = self.num_virtual_stages_per_pipeline_rank > 1
        if virtual and self.micro_batches % self.pipeline_model_parallel_size:
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank "
                f"{self.num_virtual_stages_per_pipeline_rank} needs a number of micro-batches that "
                f"is a multiple of --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}, not {self.micro_batches}; change "
                f"--global-batch-size {self.global_batch_size}"
            )
        if self.recompute_granularity not in (None, "full"):
            raise ValueError(
                f"--recompute-granularity {self.recompute_granularity}: how long that takes is not "
                "known here; give full, or leave it out"
            )

    def _divides(self, whole: str, part: str, applies: bool = True) -> None:
        if applies and getattr(self, whole) % getattr(self, part):
            raise ValueError(
                f"{_flag(whole)} {getattr(self, whole)} is no multiple of {_flag(part)} "
                f"{getattr(self, part)}; change one of them"
            )

    @property
    def chunks(self) -> int:
        """Parts of the model between boundaries."""
        return self.pipeline_model_parallel_size * self.num_virtual_stages_per_pipeline_rank

    @property
    def boundaries(self) -> int:
        """Between consecutive chunks."""
        return self.chunks - 1

    @property
    def links(self) -> int:
        """Links between processes that it uses.

        With virtual stages also that from the last process to the first, which is another one
        unless there are two.
        """
        processes = self.pipeline_model_parallel_size
        around = self.num_virtual_stages_per_pipeline_rank > 1 and processes > 2
        return processes if around else processes - 1

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def micro_batch_tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def step_tokens(self) -> int:
        """Of a step of one replica."""
        return self.global_batch_size * self.seq_length

    @property
    def padded_vocab_size(self) -> int:
        """V, rounded up as Megatron does."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def _counted_layers(self) -> int:
        """The embedding and the loss count as a layer each where they are to be accounted for."""
        more = self.account_for_embedding_in_pipeline_split, self.account_for_loss_in_pipeline_split
        return self.num_layers + sum(more)

    def layers(self, chunk: int) -> int:
        """Of a chunk."""
        less = (chunk == 0 and self.account_for_embedding_in_pipeline_split) + (
            chunk == self.chunks - 1 and self.account_for_loss_in_pipeline_split
        )
        return self._counted_layers // self.chunks - less

    @cached_property
    def layer_flops(self) -> float:
        """Of a layer, for a token, forward and backward."""
        d, heads = self.hidden_size, self.num_attention_heads
        head = self.kv_channels or d // heads
        groups = self.num_query_groups or heads
        matrices = 3 if self.swiglu else 2
        projections = 6 * d * head * (2 * heads + 2 * groups)
        mlp = 6 * d * self.ffn_width * matrices
        return float(projections + 6 * heads * head * self.seq_length + mlp)

    @property
    def output_flops(self) -> float:
        """Of the output layer, for a token, forward and backward."""
        return 6.0 * self.hidden_size * self.padded_vocab_size

    @property
    def flops_a_token(self) -> float:
        """Of the whole model, as Megatron counts them."""
        return self.num_layers * self.layer_flops + self.output_flops

    @property
    def ffn_width(self) -> int:
        """f, by Megatron's default where it is not given."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return int(4 * self.hidden_size * 2 / 3 / 64) * 64
        return 4 * self.hidden_size

    def chunk_flops(self, chunk: int) -> tuple[float, float]:
        """Forward and backward, for a micro-batch; with full recomputation layers run again."""
        layers = self.layers(chunk) * self.layer_flops * self.micro_batch_tokens
        output = self.output_flops * self.micro_batch_tokens if chunk == self.chunks - 1 else 0.0
        again = layers / 3 if self.recompute_granularity == "full" else 0.0
        return (layers + output) / 3, (layers + output) * 2 / 3 + again


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
