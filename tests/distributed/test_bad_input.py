# SPDX-License-Identifier: Apache-2.0
"""Bad input through the real entry: one clear line before training; damaged payloads are named."""

import json
import re
from pathlib import Path

import pytest
import torch

from cluster import Cluster, Result
from layouts import LAYOUTS, PP2, VPP, Layout
from tampering import NAN_STEP, VICTIM

ONE = Layout(1, "")
TWO = LAYOUTS["pp2"]
VIRTUAL = Layout(2, f"{PP2} {VPP}")
MOE = Layout(
    4,
    f"{PP2} {VPP} --bf16 --num-experts 4 --expert-model-parallel-size 2 "
    "--moe-token-dispatcher-type alltoall",
)

SUBSPACE = "--mapl-rank 8 --mapl-anchor static --mapl-projector subspace"

#: layout, flags, and what the one line must say: the flag, its value, the remedy.
REFUSED = {
    "rank-above-width": (
        TWO,
        "--mapl-rank 65",
        "--mapl-rank 65 exceeds --hidden-size 64; .*at most",
    ),
    "rank-negative": (TWO, "--mapl-rank -1", "--mapl-rank -1: a rank is a positive number"),
    "rank-zero": (
        TWO,
        "--mapl-rank 0",
        "--mapl-rank 0 compresses nothing; .*leave --mapl-rank out",
    ),
    "rank-list": (TWO, "--mapl-rank 8 8", "--mapl-rank 8 8 gives 2 ranks for 1 .*give one rank"),
    "anchor-rank-above-width": (
        TWO,
        "--mapl-rank 8 --mapl-anchor-rank 65",
        "--mapl-anchor-rank 65 exceeds --hidden-size 64; it is at most 64",
    ),
    "without-rank": (
        TWO,
        "--mapl-anchor none --mapl-report-dir there",
        "--mapl-anchor none, --mapl-report-dir there without --mapl-rank .*; add --mapl-rank, or",
    ),
    "one-stage": (
        ONE,
        "--mapl-rank 8",
        "--mapl-rank 8: a pipeline of one stage .*use --pipeline-model-parallel-size 2 or more",
    ),
    "drop": (TWO, "--mapl-rank 8 --mapl-checkpoint drop", "--mapl-checkpoint drop .*leave --mapl-"),
    "projector-step": (
        TWO,
        "--mapl-rank 8 --mapl-projector-lr-mult 1000",
        "--mapl-projector-lr-mult 1000.0 times --lr 0.003 is 3, .*lower one of them",
    ),
    "projector-start": (
        TWO,
        "--mapl-rank 8 --mapl-projector-start-step 5",
        "--mapl-projector-start-step 5 .* in step 5, which exceeds --train-iters 4; start earlier",
    ),
    "projector-start-of-the-last": (
        VIRTUAL,
        "--mapl-rank 8 --mapl-projector-start-step 3",
        "--mapl-projector-start-step 3 .* boundary 2 in step 5, which exceeds --train-iters 4; st",
    ),
    "projector-start-subspace": (
        TWO,
        f"{SUBSPACE} --mapl-projector-start-step 2",
        "--mapl-projector-start-step 2 cannot be used with --mapl-projector subspace",
    ),
    "vocabulary": (
        TWO,
        "--mapl-rank 8 --vocab-size 3000000000",
        "a vocabulary of 3000000000 tokens exceeds .*int32 .*use a tokenizer with fewer",
    ),
    "shared-link": (
        VIRTUAL,
        "--mapl-rank 8 8 16",
        "--mapl-rank 8 8 16 differs for boundaries 0 and 2, .*give .* the same",
    ),
    "shared-link-codecs": (
        VIRTUAL,
        "--mapl-rank 8 --mapl-forward-codec int8 int8 int4",
        "--mapl-forward-codec int8 int8 int4 differs for boundaries 0 and 2, .*the same",
    ),
    "receive-ahead": (
        VIRTUAL,
        "--mapl-rank 8 --mapl-receive-ahead 2",
        "--mapl-receive-ahead 2 is for pipelines without virtual stages; leave it out",
    ),
    "codec-without-use": (
        TWO,
        "--mapl-rank 8 --mapl-rvq-codes 16",
        "--mapl-rvq-codes 16 has no effect without rvq; leave it out, or give --mapl-forward",
    ),
    "topk-above-rank": (
        TWO,
        "--mapl-rank 8 --mapl-forward-codec topk --mapl-topk 9",
        "--mapl-topk 9 exceeds the 8 numbers of a row; it is at most 8",
    ),
    "lowrank-forward": (
        TWO,
        "--mapl-rank 8 --mapl-forward-codec lowrank --mapl-lowrank-q 4",
        "--mapl-forward-codec lowrank: it is for gradients, .*name another codec forward",
    ),
    "lowrank-without-q": (
        TWO,
        "--mapl-rank 8 --mapl-backward-codec lowrank",
        "--mapl-lowrank-q is missing: .*give --mapl-lowrank-q Q",
    ),
    "lowrank-above-tokens": (
        LAYOUTS["tp2-pp2"],
        "--mapl-rank 64 --mapl-backward-codec lowrank --mapl-lowrank-q 33",
        "--mapl-lowrank-q 33 exceeds the 32 tokens of a micro-batch that one process sends; it is",
    ),
    "codebook-shares": (
        LAYOUTS["tp2-pp2"],
        "--mapl-rank 8 --mapl-forward-codec rvq --mapl-rvq-codes 2 --mapl-rvq-sync-entries 2",
        "--mapl-rvq-sync-entries 2: 2 processes .*use at most 1",
    ),
    "emulated-without-links": (
        ONE,
        "--mapl-emulate-latency 5",
        "--mapl-emulate-latency 5.0 has no effect without links .*leave it out",
    ),
    "emulated-bandwidth": (
        TWO,
        "--mapl-emulate-bandwidth -5",
        "--mapl-emulate-bandwidth -5.0 must be a positive number of Mbit/s; leave it out",
    ),
    "direct": (
        TWO,
        "--mapl-rank 8 --mapl-projector none --mapl-anchor none",
        "--mapl-rank 8 with --mapl-projector none: .*give the --hidden-size, 64",
    ),
    "subspace-anchor": (
        TWO,
        "--mapl-rank 8 --mapl-projector subspace",
        "--mapl-projector subspace needs --mapl-anchor static, not factorized: .*; add --mapl",
    ),
    "subspace-ranks": (
        LAYOUTS["pp4"],
        f"{SUBSPACE} --mapl-rank 8 16 8",
        "--mapl-rank 8 16 8 with --mapl-projector subspace: .*; give one rank for all of them",
    ),
    "subspace-biases": (
        Layout(2, PP2, without=("--disable-bias-linear",)),
        SUBSPACE,
        "biases .no --disable-bias-linear. cannot be used .*; add --disable-bias-linear",
    ),
    "subspace-tied": (
        LAYOUTS["tied-embeddings"],
        SUBSPACE,
        "tied embeddings .*; add --untie-embeddings-and-output-weights",
    ),
    "subspace-dropout": (
        TWO,
        f"{SUBSPACE} --hidden-dropout 0.1",
        "--hidden-dropout 0.1 cannot be used with .*; use --hidden-dropout 0",
    ),
    "subspace-positions": (
        TWO,
        f"{SUBSPACE} --position-embedding-type learned_absolute",
        "--position-embedding-type learned_absolute cannot .*; use --position-embedding-type rope",
    ),
    "subspace-moe": (LAYOUTS["moe-ep2"], SUBSPACE, "--num-experts 4 cannot .*; leave it out"),
    "subspace-mtp": (LAYOUTS["mtp"], SUBSPACE, "--mtp-num-layers 1 cannot .*; leave it out"),
    "subspace-sharded": (
        LAYOUTS["pp2-dp2-distributed-optimizer"],
        SUBSPACE,
        "--use-distributed-optimizer over 2 replicas cannot .*; leave it out",
    ),
    "moe-overlap": (
        MOE,
        "--mapl-rank 8 --overlap-moe-expert-parallel-comm",
        "--overlap-moe-expert-parallel-comm cannot be used with --mapl-rank: .*leave one",
    ),
    "ring": (
        TWO,
        "--mapl-rank 8 --use-ring-exchange-p2p",
        "--use-ring-exchange-p2p cannot be used with --mapl-rank: .*leave one",
    ),
    "mtp-standalone": (
        TWO,
        "--mapl-rank 8 --mtp-standalone",
        "--mtp-standalone cannot be used with --mapl-rank: .*leave one",
    ),
    "mtp-layout": (
        TWO,
        "--mapl-rank 8 --mtp-num-layers 1 --pipeline-model-parallel-layout Et|tt|tm|L",
        r"--pipeline-model-parallel-layout Et\|tt\|tm\|L cannot .*into the last stage",
    ),
    "cuda-graph": (
        TWO,
        "--mapl-rank 8 --cuda-graph-impl local",
        "--cuda-graph-impl local cannot be used with --mapl-rank: .*use --cuda-graph-impl none",
    ),
    "checkpoint-format": (
        TWO,
        "--mapl-rank 8 --ckpt-format torch --save there --save-interval 2",
        "--ckpt-format torch cannot be used with --mapl-rank; use --ckpt-format torch_dist",
    ),
    "sft": (ONE, "--sft", "--sft is not supported here: .*leave the flag out"),
    "hybrid-context": (
        ONE,
        "--hybrid-context-parallel --calculate-per-token-loss",
        "--hybrid-context-parallel is not supported here: .*leave the flag out",
    ),
    "packed": (
        ONE,
        "--dataloader-inter-document-masking",
        "--dataloader-inter-document-masking is not supported here: .*leave the flag out",
    ),
    "reinforcement": (ONE, "--perform-rl-step", "--perform-rl-step is not supported here: "),
    "hybrid-model": (ONE, "--hybrid-layer-pattern M-M*", "--hybrid-layer-pattern is not supported"),
    "nccl": (
        ONE,
        "--distributed-backend nccl",
        "--distributed-backend nccl needs a GPU .*use --distributed-backend gloo",
    ),
    "transformer-engine": (
        ONE,
        "--transformer-impl transformer_engine",
        "--transformer-impl transformer_engine needs a GPU .*use --transformer-impl local",
    ),
    "context-parallel": (
        Layout(2, ""),
        "--context-parallel-size 2",
        "--context-parallel-size 2 needs a GPU .*use --context-parallel-size 1",
    ),
}


def error_lines(result: Result) -> list[str]:
    """The lines that report bad input, over all processes."""
    return [line for line in result.log.splitlines() if line.startswith("pretrain_gpt.py: error:")]


def assert_refused(result: Result, message: str) -> None:
    """Every process ended with status 2, one of them said why, and none had begun to train."""
    assert set(result.codes) == {2}, f"{result.codes}\n{result.log[-4000:]}"
    assert "Traceback" not in result.log
    assert not re.search("iteration +1/", result.log)
    lines = error_lines(result)
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_before_training(cluster: Cluster, name: str) -> None:
    layout, flags, message = REFUSED[name]
    assert_refused(cluster.run(layout.world_size, layout.command(flags), fails=True), message)


def test_megatron_fsdp(cluster: Cluster) -> None:
    """Megatron itself refuses it where CPU mode's default of this variable is left as it is."""
    command = TWO.command("--mapl-rank 8 --use-megatron-fsdp --ckpt-format fsdp_dtensor")
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    result = cluster.run(2, command, environment=environment, fails=True)
    assert_refused(result, "--use-megatron-fsdp cannot be used with --mapl-rank: .*leave one")


def test_heterogeneous_layers(cluster: Cluster, tmp_path: Path) -> None:
    block = {
        "attention": {"n_heads_in_group": 1, "no_op": False, "replace_with_linear": False},
        "ffn": {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False},
    }
    config = tmp_path / "layers.json"
    config.write_text(
        json.dumps(
            {
                "hidden_act": "silu",
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "tie_word_embeddings": False,
                "rope_theta": 10000,
                "rope_scaling": {"factor": 8.0},
                "block_configs": [block] * 4,
            }
        )
    )
    flags = (
        "--mapl-rank 8 --group-query-attention --num-query-groups 4 --use-rope-scaling "
        f"--use-rotary-position-embeddings --heterogeneous-layers-config-path {config}"
    )
    result = cluster.run(2, TWO.command(flags), fails=True)
    assert_refused(result, "--heterogeneous-layers-config-path .*cannot be used with --mapl-rank")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mapl-rank 8.5", "argument --mapl-rank: invalid int value: '8.5'"),
        ("--mapl-rank 8 --mapl-anchor foo", "argument --mapl-anchor: invalid choice: 'foo'"),
        ("--mapl-rank 8 --mapl-ranks 2", "unrecognized arguments: --mapl-ranks 2"),
    ],
)
def test_what_the_parser_refuses(cluster: Cluster, flags: str, message: str) -> None:
    """Each process parses for itself, so each of them says so."""
    result = cluster.run(2, TWO.command(flags), fails=True)
    assert result.codes == [2, 2]
    assert "Traceback" not in result.log
    assert all(message in line for line in error_lines(result))
    assert len(error_lines(result)) == 2


@pytest.mark.parametrize(
    ("common", "rank_arguments", "message"),
    [
        (
            "--mapl-rank 16",
            {1: ["--mapl-rank", "8"]},
            "--mapl-rank is 16 on rank 0 and 8 on rank 1; start all processes with the same flags",
        ),
        (
            "",
            {0: ["--mapl-rank", "16"]},
            ": --mapl-rank is 16 on rank 0 and not set on rank 1; start",
        ),
        (
            "",
            {1: ["--mapl-rank", "16", "--mapl-anchor", "none"]},
            ": --mapl-rank is not set on rank 0 and 16 on rank 1; start",
        ),
        (
            "--mapl-rank 16",
            {1: ["--mapl-anchor", "none", "--mapl-projector", "unconstrained"]},
            ": --mapl-anchor is factorized on rank 0 and none on rank 1; --mapl-projector is "
            "learned on rank 0 and unconstrained on rank 1; start",
        ),
    ],
)
def test_processes_must_agree(
    cluster: Cluster, common: str, rank_arguments: dict[int, list[str]], message: str
) -> None:
    result = cluster.run(2, TWO.command(common), rank_arguments=rank_arguments, fails=True)
    assert_refused(result, message)


def test_environments_must_agree(cluster: Cluster) -> None:
    result = cluster.run(2, TWO.command("--mapl-rank 8"), tamper="ops_of_one_process", fails=True)
    message = "MAPL_OPS is not set on rank 0 and reference on rank 1, .*; set it to the same in"
    assert_refused(result, message)


def test_cpu_mode_says_so(cluster: Cluster) -> None:
    """Once, before training."""
    result = cluster.run(2, TWO.command("--train-iters 1 --eval-iters 0"))
    assert result.log.count("no GPU on this machine: CPU mode, with gloo between processes") == 1


def test_layers_by_layout(cluster: Cluster) -> None:
    """A --pipeline-model-parallel-layout that is supported trains."""
    flags = "--mapl-rank 8 --mtp-num-layers 1 --pipeline-model-parallel-layout Ettt|tmL"
    result = cluster.run(2, TWO.command(flags))
    assert result.losses[-1] < result.losses[0]


DAMAGED = {
    "magic": ("forward", "what arrived is no payload of MAPL"),
    "token_id": ("forward", "the checksum does not match"),
    "latent": ("forward", "the checksum does not match"),
    "checksum": ("forward", "the checksum does not match"),
    "truncated": ("forward", "the checksum does not match"),
    "lost": ("forward", f"payload {VICTIM + 1} arrived: the stages are out of step"),
    "gradient": ("backward", "the checksum does not match"),
    "lost_gradient": ("backward", f"payload {VICTIM + 1} arrived: the stages are out of step"),
    "other_boundary": ("backward", "a payload of boundary 1, direction 1, arrived"),
    "projector": ("projector", "the checksum does not match"),
}


@pytest.mark.parametrize("tamper", DAMAGED)
def test_damaged_payload(cluster: Cluster, tamper: str) -> None:
    direction, fault = DAMAGED[tamper]
    result = cluster.run(2, TWO.command("--mapl-rank 8"), tamper=tamper, fails=True)
    assert 1 in result.codes and 0 not in result.codes
    victim = 0 if direction == "projector" else VICTIM
    assert f"PayloadError: boundary 0, {direction}, payload {victim}: {fault}" in result.log


def test_a_gradient_that_is_not_a_number_skips_the_step(cluster: Cluster) -> None:
    """Both sides skip that step of the projector and stay equal; the rest goes on learning."""
    command = TWO.command("--mapl-rank 8 --mapl-log-interval 1")
    result = cluster.run(2, command, tamper="projector_nan")
    one, other = (record["projectors"] for record in result.records)
    outlet, inlet = one[0, "outlet"], other[0, "inlet"]
    for name in outlet:
        assert torch.equal(outlet[name], inlet[name]), name
    assert outlet["A"].isfinite().all()
    skipped = [line["boundaries"][0]["skipped_steps"] for line in result.metrics]
    assert skipped == [int(step >= NAN_STEP) for step in range(len(skipped))]
    assert result.losses[-1] < result.losses[0]
    warning = "boundary 0: the projector's gradient was not finite in 1 step(s) up to iteration 2"
    assert result.log.count(warning) == 1
