# SPDX-License-Identifier: Apache-2.0
"""examples/llama/train.sh: what it starts torchrun with, and its errors."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from llama_example import LLAMA, RECIPES, environment, noted, stand_in
from stand_in_trainer import value

TORCHRUN = ["-m", "torch.distributed.run", "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]


def train(
    folder: Path, *words: str, job: str = "finish", **variables: str
) -> subprocess.Popen[str]:
    given = {"SAVE": str(folder / "saved"), **stand_in(folder, job), **variables}
    return subprocess.Popen(
        [str(LLAMA / "train.sh"), *words], cwd=folder, env=environment(**given), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_as_from_a_terminal,
    )  # fmt: skip


def _as_from_a_terminal() -> None:
    """Ends what a background job of a shell hands down: an interrupt that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ends(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it said on stderr until its end."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def dataset(
    folder: Path, *, vocabulary: int = 32000, valid: bool = True, model: bool = True
) -> str:
    """A finished dataset, as far as a launcher can see."""
    splits = {"_train": {}, "_valid": {}} if valid else {"": {}}
    kind = "SentencePieceTokenizer" if model else "HuggingFaceTokenizer"
    manifest = {"vocab_size": vocabulary, "splits": splits, "settings": {"tokenizer_type": kind}}
    (folder / "corpus.json").write_text(json.dumps(manifest))
    if model:
        (folder / "corpus.model").touch()
    return str(folder / "corpus")


def test_a_laptop_gets_a_process_for_each_stage(tmp_path: Path) -> None:
    ends(train(tmp_path, "tiny", "--mock-data", "--lr", "0.5"))
    note = noted(tmp_path)
    words = note["words"]
    assert words[:8] == [*TORCHRUN, "--nproc-per-node", "2", "--standalone", words[7]]
    assert words[7].endswith("/pretrain_gpt.py") and Path(words[7]).exists()
    assert value(words, "--save") == value(words, "--load") == str(tmp_path / "saved")
    assert value(words, "--tensorboard-dir") == str(tmp_path / "saved")
    assert value(words, "--save-retain-interval") == "1000"  # Megatron wants a multiple
    assert words[-3:] == ["--mock-data", "--lr", "0.5"]  # so that they win
    assert value(words, "--tokenizer-type") == "NullTokenizer"
    assert "--exit-signal-handler" in words and value(words, "--mapl-rank") == "66"
    assert note["variables"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert {"SIGTERM", "SIGUSR1"} < {*note["ignores"]}


def test_a_node_gets_a_process_for_each_gpu(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    ends(train(tmp_path, "150m", DATA=data, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"))
    words = noted(tmp_path)["words"]
    assert value(words, "--nproc-per-node") == "8" and "--standalone" in words
    assert value(words, "--train-data-path") == data + "_train"
    assert value(words, "--valid-data-path") == data + "_valid"
    assert value(words, "--tokenizer-model") == data + ".model"
    assert value(words, "--data-cache-path").startswith(str(tmp_path / "cache-"))


def test_processes_may_share_a_gpu(tmp_path: Path) -> None:
    more = {"CUDA_VISIBLE_DEVICES": "0", "NPROC_PER_NODE": "4"}
    ends(train(tmp_path, "150m", "--mock-data", "--distributed-backend", "gloo", **more))
    assert value(noted(tmp_path)["words"], "--nproc-per-node") == "4"


def test_slurm_knows_the_gpus_of_a_node(tmp_path: Path) -> None:
    allotted = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    ends(train(tmp_path, "150m", "--mock-data", **allotted))
    assert value(noted(tmp_path)["words"], "--nproc-per-node") == "8"
    ends(train(tmp_path, "150m", "--mock-data", NPROC_PER_NODE="4", **allotted))
    assert value(noted(tmp_path)["words"], "--nproc-per-node") == "4"


@pytest.mark.parametrize(("visible", "expected"), [("-1", "4"), ("0,1,2,3,-1,4", "4")])
def test_cuda_sees_no_gpu_from_minus_one_on(tmp_path: Path, visible: str, expected: str) -> None:
    ends(train(tmp_path, "150m", "--mock-data", CUDA_VISIBLE_DEVICES=visible))
    assert value(noted(tmp_path)["words"], "--nproc-per-node") == expected


@pytest.mark.parametrize(
    "flag", ["--data-path", "--train-data-path", "--data-args-path", "--per-split-data-args-path"]
)
def test_megatrons_own_flags_for_data(tmp_path: Path, flag: str) -> None:
    ends(train(tmp_path, "150m", flag, "there", "--tokenizer-type", "NullTokenizer"))
    words = noted(tmp_path)["words"]
    assert [word for word in words if "data-" in word] == [flag]
    assert words.count("--tokenizer-type") == 1


@pytest.mark.parametrize("names", [("NNODES", "NODE_RANK"), ("SLURM_NNODES", "SLURM_NODEID")])
def test_one_node_of_many(tmp_path: Path, names: tuple[str, str]) -> None:
    more = {names[0]: "4", names[1]: "3", "MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    more |= {"NPROC_PER_NODE": "8", "NETWORK_INTERFACE": "lo"}
    ends(train(tmp_path, "7b", "--mock-data", **more))
    note = noted(tmp_path, 3)
    assert note["words"][4:14] == (
        "--nproc-per-node 8 --nnodes 4 --node-rank 3 --master-addr head --master-port 4000".split()
    )
    assert note["variables"]["NCCL_SOCKET_IFNAME"] == "=lo"
    assert note["variables"]["GLOO_SOCKET_IFNAME"] == "lo"


def test_plain_megatron_is_the_recipe_without_boundaries(tmp_path: Path) -> None:
    ends(train(tmp_path, "tiny", "--mock-data"))
    with_mapl = noted(tmp_path)["words"]
    ends(train(tmp_path, "tiny", "--mock-data", PLAIN="1"))
    plain = noted(tmp_path)["words"]
    gone = [word for word in with_mapl if word not in plain]
    assert gone == ["--mapl-rank", "66", "--mapl-anchor-buckets", "16384"]
    assert "--mapl" not in " ".join(plain)


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    data = dataset(tmp_path, vocabulary=128256, model=False)
    ends(train(tmp_path, "8b", "--tokenizer-model", "llama", DATA=data, NPROC_PER_NODE="32"))
    words = noted(tmp_path)["words"]
    assert value(words, "--tokenizer-type") == "HuggingFaceTokenizer"
    assert value(words, "--tokenizer-model") == "llama"


def test_help_lists_the_recipes(tmp_path: Path) -> None:
    process = train(tmp_path, "--help")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert said.splitlines()[-1] == f"Recipes: {' '.join(RECIPES)}"
    assert "to this script: the job saves" in said and "set -euo" not in said


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["2b"], {}, "there is no recipe '2b'; choose one of: 150m 1b 500m 7b 8b tiny"),
        (["common"], {}, "there is no recipe 'common'"),
        (["150m"], {}, "DATA is not set; make a dataset with tools/prepare_data.py"),
        (["150m"], {"DATA": "nowhere"}, "there is no nowhere.json, so no finished dataset"),
        (["150m", "--mock-data"], {"PLAIN": "yes"}, "PLAIN=yes is neither 1"),
        (["150m", "--mock-data"], {"NPROC_PER_NODE": "6"}, "cannot hold replicas of 4 stages"),
        (["7b", "--mock-data"], {"CUDA_VISIBLE_DEVICES": "0,1"}, "1 nodes × 2 processes"),
        (["tiny", "--mock-data"], {"CUDA_VISIBLE_DEVICES": "0"},
         "share a GPU: NPROC_PER_NODE=2 and --distributed-backend gloo"),
        (["150m", "--mock-data"], {"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE='gpu' is no number"),
        (["150m", "--mock-data"], {"NNODES": "2:4"}, "NNODES='2:4' is no number from 1; set"),
        (["150m", "--mock-data", "--pipeline-model-parallel-size"], {},
         "--pipeline-model-parallel-size='' is no number from 1; give it the number of stages"),
        (["tiny", "--mock-data", "--save-interval", "x"], {}, "--save-interval='x' is no number"),
        (["150m", "--tensor-model-parallel-size=x"], {}, "--tensor-model-parallel-size='x' is"),
        (["150m"], {"DATA": ""}, "or Megatron's own --data-path, --train-data-path"),
        (["150m", "--mock-data"], {"NNODES": "2"}, "NODE_RANK='' must be from 0 to 1"),
        (["150m", "--mock-data"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK='2'"),
        (["150m", "--mock-data"], {"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        (["150m", "--mock-data"], {"NETWORK_INTERFACE": "wan9"}, "INTERFACE=wan9 is not on"),
    ],
)  # fmt: skip
def test_errors_come_before_the_job(
    tmp_path: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    said = ends(train(tmp_path, *words, **variables), 2)
    assert message in said and len(said.splitlines()) == 1
    assert not list(tmp_path.glob("node-*"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"vocabulary": 8192}, "has a vocabulary of 8192 tokens, the model one of 32000"),
        ({"valid": False}, "has no validation part"),
        ({"model": False}, "was made with a tokenizer from elsewhere; add --tokenizer-model"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path: Path, made: dict[str, bool], message: str) -> None:
    data = dataset(tmp_path, **made)  # type: ignore[arg-type]
    said = ends(train(tmp_path, "150m", DATA=data), 2)
    assert message in said and data in said and len(said.splitlines()) == 1


def test_without_an_environment_it_says_so(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(LLAMA, checkout / "examples" / "llama")
    variables = {**environment(SAVE=str(tmp_path)), "PYTHON": ""}
    done = subprocess.run(
        [str(checkout / "examples/llama/train.sh"), "tiny", "--mock-data"], env=variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"there is no {checkout}/.venv/bin/python; run make setup, or set PYTHON" in done.stderr


def test_a_failure_is_the_status(tmp_path: Path) -> None:
    ends(train(tmp_path, "tiny", "--mock-data", job="crash-0"), 3)
