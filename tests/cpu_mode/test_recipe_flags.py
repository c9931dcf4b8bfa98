# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/llama at full size: Megatron takes their flags; what they say is so."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder
from torch._subclasses.fake_tensor import FakeTensorMode

import traffic_budget
from tests.cpu_mode.flag_parsing import Parse

LLAMA = Path(__file__).parent.parent.parent / "examples" / "llama"
RECIPES = sorted(path.stem for path in (LLAMA / "recipes").glob("*.flags") if path.stem != "common")
#: Times fewer bytes that a recipe promises, and the learning rates of those with Muon.
RATIO = {"150m": 4, "500m": 6, "1b": 8, "7b": 8, "8b": 8, "tiny": 8}
MUON_LR = {"150m": 0.02, "500m": 0.02, "1b": 0.01, "tiny": 0.02}


def flags(recipe: str, *, plain: bool = False) -> list[str]:
    """What train.sh reads."""
    script = (
        f'source "{LLAMA}/recipe.sh"; read_recipe {recipe}; printf "%s\\n" "${{recipe_flags[@]}}"'
    )
    variables = {**os.environ, "PLAIN": "1" if plain else ""}
    read = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=variables, check=True, capture_output=True
    )
    return read.stdout.decode().splitlines()


def parsed(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, words: list[str], world_size: int
) -> tuple[Any, Any]:
    more = "--mock-data --tokenizer-type NullTokenizer --save nowhere --load nowhere"
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return parse([*words, *more.split()])


@pytest.fixture(scope="module")
def lone_process() -> Iterator[None]:
    """A job of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_counts_as_many_parameters(
    recipe: str, lone_process: None, parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (LLAMA / "recipes" / f"{recipe}.flags").read_text()
    alone = "--pipeline-model-parallel-size 1 --tensor-model-parallel-size 1".split()
    args, _ = parsed(parse, monkeypatch, [*flags(recipe, plain=True), *alone], 1)
    config = gpt_config_from_args(args)
    with FakeTensorMode():  # shapes without memory
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert args.padded_vocab_size == args.vocab_size
    assert f"{count:,} parameters" in text
    tokens = args.global_batch_size * args.seq_length
    if recipe != "tiny":
        assert args.train_iters == math.ceil(20 * count / tokens)
        said = f"20 × {count:,} / ({args.global_batch_size} × {args.seq_length})"
        assert said in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_are_taken_and_save_what_they_promise(
    recipe: str,
    parse: Parse,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = flags(recipe)
    model = 4 * 8 if recipe in ("7b", "8b") else 2 if recipe == "tiny" else 4
    replicas = 1 if recipe == "tiny" else 2
    args, runtime = parsed(parse, monkeypatch, words, model * replicas)
    assert args.data_parallel_size == replicas
    assert args.padded_vocab_size == args.vocab_size  # with its own tensor parallelism
    assert args.exit_signal_handler and args.bf16
    config = runtime.config
    assert len(runtime.plan.ranks) == args.pipeline_model_parallel_size - 1
    if recipe in MUON_LR:
        assert (args.optimizer, args.lr) == ("muon", MUON_LR[recipe])
        assert args.decoupled_lr == args.lr / 2
    saved = ratio(args, config, monkeypatch, capsys)
    assert RATIO[recipe] <= saved < 1.04 * RATIO[recipe]


def ratio(
    args: Any, config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> float:
    """How many times fewer bytes, by tools/traffic_budget.py."""
    tokens = args.seq_length * args.micro_batch_size
    [forward], [backward] = {*config.forward_codec}, {*config.backward_codec}
    budget = (
        f"--hidden-size {args.hidden_size} --rank {config.rank[0]} --vocab-size {args.vocab_size} "
        f"--micro-batch-tokens {tokens} --step-tokens {args.global_batch_size * args.seq_length} "
        f"--tensor-model-parallel-size {args.tensor_model_parallel_size} "
        f"--forward-codec {forward} --backward-codec {backward} "
        f"--projector-exchange {config.projector_exchange}"
    ).split()
    if args.sequence_parallel:
        budget.append("--sequence-parallel")
    monkeypatch.setattr(sys, "argv", ["traffic_budget.py", *budget])
    traffic_budget.main()
    found = re.search(r"^ratio (\S+),", capsys.readouterr().out, re.M)
    assert found
    return float(found[1])


PAPER = "--mapl-preset paper --mapl-rank 256".split()


@pytest.mark.parametrize("recipe", ["150m", "500m", "1b"])
def test_the_papers_setting_of_its_sizes(
    recipe: str,
    parse: Parse,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the README says; token ids and the projector come on top of the latents."""
    args, runtime = parsed(parse, monkeypatch, [*flags(recipe), *PAPER], 4)
    assert args.hidden_size == RATIO[recipe] * runtime.config.rank[0]
    assert runtime.config.anchor == "factorized" and runtime.config.anchor_rank == 256
    saved = ratio(args, runtime.config, monkeypatch, capsys)
    assert f"{saved:.2f}" in (LLAMA / "README.md").read_text()
    assert 0.99 * RATIO[recipe] < saved < RATIO[recipe]


def test_the_papers_setting_is_not_for_tiny(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(parse, monkeypatch, [*flags("tiny"), *PAPER], 2)
    assert "--mapl-anchor-buckets 16384" in capsys.readouterr().err
