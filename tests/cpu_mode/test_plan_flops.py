# SPDX-License-Identifier: Apache-2.0
"""plan.py counts floating-point operations and chooses receiving ahead as Megatron's side does."""

import dataclasses

import pytest
from megatron.training.training import num_floating_point_operations

import plan_settings
from megatron.mapl import job_runtime
from plan_job import Job
from tests.cpu_mode.flag_parsing import Parse

SHAPES = {
    "llama": {"swiglu": True, "ffn_hidden_size": 688},
    "grouped queries": {"swiglu": True, "num_query_groups": 2},
    "wide heads": {"kv_channels": 96},
    "gelu": {"vocab_size": 50257},
}


@pytest.mark.parametrize("name", SHAPES)
def test_as_many_as_megatron_counts(name: str, parse: Parse) -> None:
    shape = {
        "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128,
        "vocab_size": 1000, "micro_batch_size": 1, "global_batch_size": 8, **SHAPES[name],
    }  # fmt: skip
    job = Job(pipeline_model_parallel_size=2, **shape)  # type: ignore[arg-type]
    flags = "--train-iters 1 --lr 1e-3 --bf16 --mock-data --tokenizer-type NullTokenizer".split()
    flags += ["--max-position-embeddings", "128"]
    if "num_query_groups" in shape:
        flags.append("--group-query-attention")
    for key, value in shape.items():
        flag = f"--{key.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    args, _ = parse(flags)
    args.padded_vocab_size = job_runtime._padded_vocab_size(args)
    assert args.ffn_hidden_size == job.ffn_width
    assert args.padded_vocab_size == job.padded_vocab_size
    assert num_floating_point_operations(args, 8) == job.flops_a_token * job.step_tokens


@pytest.mark.parametrize(
    "flags",
    [
        "--mapl-rank 16 --mapl-preset paper",
        "--mapl-rank 0 16 8 --mapl-forward-codec pipeline rvq int8 --mapl-rvq-groups 2",
        "--mapl-rank 64 --mapl-projector none --mapl-anchor none --mapl-forward-codec topk "
        "--mapl-topk 3 --mapl-no-tensor-parallel-split --mapl-receive-ahead 0",
    ],
)
def test_reads_settings_as_megatron_does(
    flags: str, parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Megatron, from a line of flags."""
    model = (
        "--pipeline-model-parallel-size 4 --num-layers 4 --hidden-size 64 --num-attention-heads 4 "
        "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 "
        "--train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, runtime = parse([*model.split(), *flags.split()])
    # The rows for bigrams follow from the vocabulary, which the line of a setting does not have.
    config = dataclasses.replace(runtime.config, anchor_buckets=None)
    read = plan_settings.Setting("", plan_settings.read([*model.split(), *flags.split()]))
    assert read.config == config
    again = plan_settings.Setting("", plan_settings.read(read.command_line.split()))
    assert again.config == config
