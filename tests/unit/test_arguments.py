# SPDX-License-Identifier: Apache-2.0
"""The `--mapl-*` flags: generated from MaplConfig, read back whole, refused beside what cannot be.

Megatron's argument module imports without a GPU in CPU mode alone, which changes torch for the life
of a process. So all cases run in one process of their own, which answers with JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mapl.config import MaplConfig
from megatron.mapl import arguments, errors

ROOT = Path(__file__).parent.parent.parent

#: What `check_supported` reads of Megatron's namespace, in a job that it lets through.
MEGATRON = {
    "cuda_graph_impl": "none",
    "save": None,
    "load": None,
    "ckpt_format": "torch_dist",
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_size": 2,
    "pipeline_model_parallel_layout": None,
    "mtp_num_layers": None,
    "num_layers": 4,
    "lr": 1e-3,
    "data_parallel_size": 1,
    "context_parallel_size": 1,
    "use_distributed_optimizer": False,
    "use_layer_wise_distributed_optimizer": False,
    "train_iters": None,
    "train_samples": None,
    "global_batch_size": 8,
    "step_batch_size_schedule": None,
    "iterations_to_skip": [],
}

ANSWER = """
import argparse, json, sys
from megatron.mapl import cpu
cpu.install()
from mapl.plan import plan_boundaries
from megatron.mapl import arguments

answers = []
for words, megatron in json.load(sys.stdin):
    parser = arguments.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(words)
    for name, value in megatron.items():
        setattr(args, name, value)
    answer = {"error": None}
    try:
        config = arguments.config_from_args(args)
        if config is not None:
            arguments.check_supported(args, config)
            boundaries = args.pipeline_model_parallel_size - 1
            if config.projector_start_step is not None:
                plan = plan_boundaries(config, hidden_size=64, boundaries=boundaries)
                arguments.check_projector_starts(args, plan)
    except ValueError as error:
        answer["error"] = str(error)
    answer["mapl"] = {k: v for k, v in vars(args).items() if k.startswith("mapl_")}
    answers.append(answer)
print("\\n" + json.dumps(answers))
"""


def run(arguments: list[str], text: str = "") -> str:
    """The standard output of a Python process in the project's root."""
    result = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


READ = {
    "": {f"mapl_{field.name}": None for field in fields(MaplConfig)},
    "--mapl-checkpoint drop": {"mapl_checkpoint": "drop", "mapl_rank": None, "mapl_anchor": None},
    "--mapl-rank 8": {
        "mapl_rank": [8],
        "mapl_anchor": "bigram",
        "mapl_anchor_rank": None,
        "mapl_projector": "learned",
        "mapl_projector_lr_mult": 0.1,
        "mapl_projector_exchange": "bf16",
        "mapl_checkpoint": "match",
        "mapl_report_dir": None,
        "mapl_log_interval": None,
        "mapl_geometry_interval": None,
        "mapl_projector_start_step": None,
        "mapl_forward_codec": ["int8"],
        "mapl_backward_codec": ["int4"],
        "mapl_tensor_parallel_split": True,
        "mapl_receive_ahead": None,
        "mapl_rvq_codes": None,
    },
    "--mapl-rank 8 0 8 --mapl-preset paper": {
        "mapl_preset": "paper",
        "mapl_anchor": "factorized",
        "mapl_anchor_rank": 8,
        "mapl_forward_codec": ["pipeline"],
        "mapl_backward_codec": ["pipeline"],
        "mapl_projector_exchange": "fp32",
    },
    "--mapl-rank 8 --mapl-preset paper --mapl-anchor none --mapl-backward-codec int8": {
        "mapl_anchor": "none",
        "mapl_anchor_rank": None,
        "mapl_forward_codec": ["pipeline"],
        "mapl_backward_codec": ["int8"],
    },
    "--mapl-rank 8 16 --mapl-preset paper --mapl-anchor-rank 4": {"mapl_anchor_rank": 4},
    "--mapl-rank 8 --mapl-forward-codec rvq --mapl-backward-codec int4 --mapl-rvq-codes 16 "
    "--mapl-no-tensor-parallel-split --mapl-projector-exchange fp32": {
        "mapl_forward_codec": ["rvq"],
        "mapl_backward_codec": ["int4"],
        "mapl_rvq_codes": 16,
        "mapl_tensor_parallel_split": False,
        "mapl_projector_exchange": "fp32",
    },
    "--mapl-rank 8 0 16 --mapl-anchor-rank 4 --mapl-projector-lr-mult 0.5 --mapl-report-dir out": {
        "mapl_rank": [8, 0, 16],
        "mapl_anchor_rank": 4,
        "mapl_projector_lr_mult": 0.5,
        "mapl_report_dir": "out",
    },
}

REFUSED_FLAGS = {
    "--mapl-anchor none --mapl-log-interval 2": (
        r"--mapl-anchor none, --mapl-log-interval 2 without --mapl-rank .*; add --mapl-rank, or"
    ),
    "--mapl-checkpoint fresh": "--mapl-checkpoint fresh without --mapl-rank has no effect",
    "--mapl-checkpoint match": "--mapl-checkpoint match without --mapl-rank has no effect",
    "--mapl-rank 8 --mapl-checkpoint drop": "--mapl-checkpoint drop .*leave --mapl-rank out",
    "--mapl-preset paper": "--mapl-preset paper without --mapl-rank has no effect",
    "--mapl-rank 8 16 --mapl-preset paper": "--mapl-preset paper .* 8 16; give --mapl-anchor-rank",
    "--mapl-rank -8": "--mapl-rank -8: a rank is a positive number",
    "--mapl-rank 8 --mapl-anchor full --mapl-anchor-rank 4": "no effect with --mapl-anchor full",
}

REFUSED_BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "overlap": (
        {"overlap_moe_expert_parallel_comm": True},
        "--overlap-moe-expert-parallel-comm cannot be used with --mapl-rank: .*leave one",
    ),
    "ring": ({"use_ring_exchange_p2p": True}, "--use-ring-exchange-p2p cannot be used"),
    "mtp": ({"mtp_standalone": True}, "--mtp-standalone cannot be used"),
    "fsdp": ({"use_megatron_fsdp": True}, "--use-megatron-fsdp cannot be used"),
    "heterogeneous": (
        {"heterogeneous_layers_config_encoded_json": "{}"},
        "--heterogeneous-layers-config-path .*cannot be used",
    ),
    "graph": ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration cannot"),
    "save": ({"save": "there", "ckpt_format": "torch"}, "--ckpt-format torch .*torch_dist"),
    "load": ({"load": "there", "ckpt_format": "torch"}, "--ckpt-format torch .*torch_dist"),
    "layout": (
        {"pipeline_model_parallel_layout": "Et|ttt|m|L", "mtp_num_layers": 1},
        r"--pipeline-model-parallel-layout Et\|ttt\|m\|L cannot .*into the last stage",
    ),
    "step": ({"lr": 10.0}, "--mapl-projector-lr-mult 0.1 times --lr 10.0 is 1, .*lower one"),
}

ALLOWED_BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "other-format-without-checkpoints": {"ckpt_format": "torch"},
    "layout": {"pipeline_model_parallel_layout": "Ettt|tmL", "mtp_num_layers": 1},
    "virtual": {"virtual_pipeline_model_parallel_size": 2},
    "no-learning-rate": {"lr": None},
}

SUBSPACE = "--mapl-rank 8 --mapl-anchor static --mapl-projector subspace"

REFUSED_BESIDE_SUBSPACE: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"add_bias_linear": True}, "biases .*; add --disable-bias-linear"),
    "tied": (
        {"untie_embeddings_and_output_weights": False},
        "tied embeddings .*; add --untie-embeddings-and-output-weights",
    ),
    "dropout": ({"hidden_dropout": 0.1}, "--hidden-dropout 0.1 .*; use --hidden-dropout 0"),
    "positions": (
        {"position_embedding_type": "learned_absolute"},
        "--position-embedding-type learned_absolute .*; use --position-embedding-type rope",
    ),
    "moe": ({"num_experts": 4}, "--num-experts 4 .*; leave it out"),
    "mtp": ({"mtp_num_layers": 1}, "--mtp-num-layers 1 .*; leave it out"),
    "attention": (
        {"experimental_attention_variant": "gated_delta_net"},
        "--experimental-attention-variant gated_delta_net .*; leave it out",
    ),
    "norm": (
        {"apply_residual_connection_post_layernorm": True},
        "--apply-residual-connection-post-layernorm cannot .*; leave it out",
    ),
    "fp8": ({"fp8": "hybrid"}, "--fp8-format hybrid .*; leave it out"),
    "fp4": ({"fp4": "e2m1"}, "--fp4-format e2m1 .*; leave it out"),
    "precision": (
        {"use_precision_aware_optimizer": True},
        "--use-precision-aware-optimizer cannot .*; leave it out",
    ),
    "torch-fsdp": ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 cannot .*; leave it out"),
    "distributed": (
        {"use_distributed_optimizer": True, "data_parallel_size": 2},
        "--use-distributed-optimizer over 2 replicas .*; leave it out",
    ),
    "distributed-context": (
        {"use_distributed_optimizer": True, "context_parallel_size": 4},
        "--use-distributed-optimizer over 4 replicas .*; leave it out",
    ),
    "layer-wise": (
        {"use_layer_wise_distributed_optimizer": True, "data_parallel_size": 2},
        "--use-distributed-optimizer over 2 replicas .*use --optimizer muon, not dist_muon",
    ),
}

ALLOWED_BESIDE_SUBSPACE: dict[str, dict[str, Any]] = {
    "llama": {
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope",
        "num_experts": None,
    },
    "whole": {"use_distributed_optimizer": True},
    "replicas": {"data_parallel_size": 2},
}

GEOMETRY: dict[tuple[str, int], str | None] = {
    ("--mapl-geometry-interval 100", 50): None,
    ("--mapl-geometry-interval 100 --mapl-log-interval 20", 7): None,
    (
        "--mapl-geometry-interval 100",
        30,
    ): "--mapl-geometry-interval 100 is no multiple of --log-interval 30, .*; use 120, or give",
    (
        "--mapl-geometry-interval 5 --mapl-log-interval 10",
        1,
    ): "--mapl-geometry-interval 5 is no multiple of --mapl-log-interval 10, .*; use 10, or give",
}

START = "--mapl-projector-start-step"
FOUR = {"pipeline_model_parallel_size": 4}

#: The ranks, N, what the job trains, and what is said of it.
STARTS: list[tuple[str, int, dict[str, Any], str | None]] = [
    ("8", 1, {"train_iters": 100}, None),
    ("8", 100, {"train_iters": 100, "iterations_to_skip": [99]}, None),
    (
        "8",
        101,
        {"train_iters": 100},
        "-start-step 101 starts .* boundary 0 in step 101, which exceeds --train-iters 100; start "
        "earlier, or train longer",
    ),
    ("8", 12, {"train_samples": 100}, None),
    ("8", 13, {"train_samples": 100}, "in step 13, which exceeds the 12 steps of this job; start"),
    ("8", 13, {"train_samples": 100, "step_batch_size_schedule": "0:4 50:8"}, None),
    (
        "8",
        7,
        {"train_iters": 100, "iterations_to_skip": [7]},
        "-start-step 7 .* step 7, which is among --iterations-to-skip .*choose another step",
    ),
    ("8", 98, {"train_iters": 100, **FOUR}, None),
    ("8", 99, {"train_iters": 100, **FOUR}, "-start-step 99 .* boundary 2 in step 101, which exce"),
    ("8 8 0", 99, {"train_iters": 100, **FOUR}, None),
    (
        "8",
        7,
        {"train_iters": 100, "iterations_to_skip": [8], **FOUR},
        "-start-step 7 .* boundary 1 in step 8, which is among --iterations-to-skip",
    ),
    ("8 0 8", 7, {"train_iters": 100, "iterations_to_skip": [6, 8, 10], **FOUR}, None),
]

SHARED_LINKS = {
    "8 8 16": "--mapl-rank 8 8 16 differs for boundaries 0 and 2, ",
    "8 0 8": None,
    "8 0 8 0 8 0 0": "differs for boundaries 0 and 6, ",
}

Answers = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Looks up what one process answered to all cases of this file."""
    beside = [megatron for megatron, _ in REFUSED_BESIDE.values()] + [*ALLOWED_BESIDE.values()]
    beside_subspace = [megatron for megatron, _ in REFUSED_BESIDE_SUBSPACE.values()]
    beside_subspace += ALLOWED_BESIDE_SUBSPACE.values()
    virtual = {"virtual_pipeline_model_parallel_size": 2}
    cases: list[tuple[list[str], dict[str, Any]]] = [
        *((flags.split(), {}) for flags in (*READ, *REFUSED_FLAGS)),
        *((["--mapl-rank", "8"], megatron) for megatron in beside),
        *((SUBSPACE.split(), megatron) for megatron in beside_subspace),
        *((["--mapl-rank", *ranks.split()], virtual) for ranks in SHARED_LINKS),
        *((f"--mapl-rank 8 {flags}".split(), {"log_interval": n}) for flags, n in GEOMETRY),
        *((f"--mapl-rank {r} {START} {step}".split(), more) for r, step, more, _ in STARTS),
    ]
    asked = [(words, {**MEGATRON, **megatron}) for words, megatron in cases]
    got = json.loads(run(["-c", ANSWER], json.dumps(asked)).splitlines()[-1])
    found = {json.dumps(case): answer for case, answer in zip(cases, got, strict=True)}
    return lambda flags, megatron=None: found[json.dumps([flags.split(), megatron or {}])]


@pytest.mark.parametrize("flags", READ)
def test_flags_are_read(answers: Answers, flags: str) -> None:
    answer = answers(flags)
    assert answer["error"] is None
    names = [field.name for field in fields(MaplConfig)]
    assert set(answer["mapl"]) == {f"mapl_{name}" for name in [*names, "preset"]}
    assert {name: answer["mapl"][name] for name in READ[flags]} == READ[flags]


def assert_error(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if answer["error"] is not None:
            raise ValueError(answer["error"])


@pytest.mark.parametrize("flags", REFUSED_FLAGS)
def test_flags_are_refused(answers: Answers, flags: str) -> None:
    assert_error(answers(flags), REFUSED_FLAGS[flags])


@pytest.mark.parametrize("name", REFUSED_BESIDE)
def test_features_of_megatron_are_refused(answers: Answers, name: str) -> None:
    megatron, message = REFUSED_BESIDE[name]
    assert_error(answers("--mapl-rank 8", megatron), message)


@pytest.mark.parametrize("name", ALLOWED_BESIDE)
def test_features_of_megatron_are_let_through(answers: Answers, name: str) -> None:
    assert answers("--mapl-rank 8", ALLOWED_BESIDE[name])["error"] is None


@pytest.mark.parametrize("name", REFUSED_BESIDE_SUBSPACE)
def test_what_leaves_the_subspace_is_refused(answers: Answers, name: str) -> None:
    megatron, message = REFUSED_BESIDE_SUBSPACE[name]
    assert_error(answers(SUBSPACE, megatron), message)


@pytest.mark.parametrize("name", ALLOWED_BESIDE_SUBSPACE)
def test_what_stays_in_the_subspace_is_let_through(answers: Answers, name: str) -> None:
    assert answers(SUBSPACE, ALLOWED_BESIDE_SUBSPACE[name])["error"] is None


@pytest.mark.parametrize("ranks", SHARED_LINKS)
def test_boundaries_on_one_link_have_one_rank(answers: Answers, ranks: str) -> None:
    answer = answers(f"--mapl-rank {ranks}", {"virtual_pipeline_model_parallel_size": 2})
    message = SHARED_LINKS[ranks]
    if message is None:
        assert answer["error"] is None
    else:
        assert_error(answer, message)


@pytest.mark.parametrize(("flags", "log_interval"), GEOMETRY)
def test_geometry_is_measured_where_there_is_a_line(
    answers: Answers, flags: str, log_interval: int
) -> None:
    answer = answers(f"--mapl-rank 8 {flags}", {"log_interval": log_interval})
    message = GEOMETRY[flags, log_interval]
    if message is None:
        assert answer["error"] is None
    else:
        assert_error(answer, message)


@pytest.mark.parametrize(("ranks", "step", "megatron", "message"), STARTS)
def test_projectors_start_in_steps_that_are_trained(
    answers: Answers, ranks: str, step: int, megatron: dict[str, Any], message: str | None
) -> None:
    answer = answers(f"--mapl-rank {ranks} {START} {step}", megatron)
    if message is None:
        assert answer["error"] is None
    else:
        assert_error(answer, message)


#: Settings that `check_supported` looks up leniently must exist, or the check would never fire.
EXISTING = """
import argparse
from megatron.mapl import cpu
cpu.install()
from megatron.mapl import arguments, subspace
from megatron.training.arguments import add_megatron_arguments
parser = argparse.ArgumentParser()
add_megatron_arguments(parser)
known = {action.dest for action in parser._actions}
looked_up = {*arguments._UNSUPPORTED, "cuda_graph_impl", *(need[0] for need in subspace._NEEDED)}
missing = looked_up - known
assert not missing, missing
"""


def test_every_refused_setting_exists_in_megatron() -> None:
    run(["-c", EXISTING])


def test_help_shows_the_docstrings() -> None:
    shown = " ".join(run(["pretrain_gpt.py", "--help"]).split())
    assert "Learned subspace compression of the boundaries between pipeline stages." in shown
    for field in fields(MaplConfig):
        no = "no-" if field.default is True else ""
        assert f"--mapl-{no}{field.name.replace('_', '-')} " in shown
    for words in (
        "Projector rank r, the width of what crosses a boundary",
        "Rank r_a of the factorized and bigram anchors; it costs memory, no traffic.",
        "{factorized,bigram,none,static,full}",
        "{learned,fixed,unconstrained,subspace,none}",
        "{pipeline,fp8,int8,int4,rvq,topk,lowrank}",
        "--mapl-emulate-bandwidth",
        "--mapl-emulate-latency",
        "Steps between two lines of mapl_metrics.jsonl. Default: --log-interval.",
    ):
        assert words in shown, words


def report(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Reports bad input as a process with this environment does."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["somewhere/script.py", "--mapl-rank", "0"])
    with pytest.raises(SystemExit) as stop:
        errors.exit_with_error(ValueError("--mapl-rank 0 compresses nothing"))
    assert stop.value.code == 2


LINE = "script.py: error: --mapl-rank 0 compresses nothing\n"


def test_the_first_process_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    report(monkeypatch, {"RANK": "1", "LOCAL_RANK": "1"})
    assert capsys.readouterr().err == ""
    report(monkeypatch, {"RANK": "0", "LOCAL_RANK": "0"})
    assert capsys.readouterr().err == LINE


def test_under_torchrun_whoever_fails_reports_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad flags of one process alone are not lost because rank 0 does not see them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    torchrun = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "4",
    }
    for rank in "31":
        report(monkeypatch, {**torchrun, "RANK": rank, "LOCAL_RANK": rank})
    assert capsys.readouterr().err == LINE


def test_without_an_answer_from_torchrun_it_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "_STORE_SECONDS", 1)
    closed = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    port = closed.port
    del closed
    torchrun = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "4",
        "RANK": "3",
    }
    report(monkeypatch, torchrun)
    assert LINE in capsys.readouterr().err


def test_emulated_links_are_for_gloo() -> None:
    args = SimpleNamespace(
        pipeline_model_parallel_size=2, mapl_emulate_latency=5.0, distributed_backend="gloo"
    )
    assert arguments.emulation_from_args(args).emulate_latency == 5
    args.distributed_backend = "nccl"
    with pytest.raises(ValueError, match=r"--mapl-emulate-latency 5.0 .*--distributed-backend gl"):
        arguments.emulation_from_args(args)


@pytest.mark.parametrize(("tokens", "ranks"), [(12, 1), (16, 4)])
def test_a_context_parallel_part_is_split_if_it_divides(tokens: int, ranks: int) -> None:
    args = SimpleNamespace(
        tensor_model_parallel_size=4,
        sequence_parallel=False,
        seq_length=tokens,
        context_parallel_size=2,
    )
    assert arguments.split_ranks(args, MaplConfig(rank=[8])) == ranks


@pytest.mark.parametrize(
    ("mapl_rank", "values", "message"),
    [
        (
            8,
            ["triton", "triton", None],
            "MAPL_OPS is triton on rank 0 and not set on rank 2, .*set it",
        ),
        (8, ["", "reference"], "MAPL_OPS is not set on rank 0 and reference on rank 1, .*; set it"),
        (8, [None, ""], None),
        (8, ["reference", "reference"], None),
        (None, ["triton", None], None),  # no boundary
    ],
)
def test_mapl_ops_is_the_same_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
    mapl_rank: int | None,
    values: list[str | None],
    message: str | None,
) -> None:
    args = SimpleNamespace(mapl_rank=mapl_rank)
    handed_in: list[Any] = []

    def collect(everyone: list[Any], own: Any) -> None:
        handed_in.append(own)
        everyone[:] = [own] * len(everyone)

    def give_all(everyone: list[Any], own: Any) -> None:
        everyone[:] = handed_in

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(values))
    monkeypatch.setattr(torch.distributed, "all_gather_object", collect)
    for value in values:
        monkeypatch.delenv("MAPL_OPS", raising=False)
        if value is not None:
            monkeypatch.setenv("MAPL_OPS", value)
        arguments.check_same_on_all_ranks(args)
    monkeypatch.setattr(torch.distributed, "all_gather_object", give_all)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        arguments.check_same_on_all_ranks(args)
