# SPDX-License-Identifier: Apache-2.0
"""Trained models through transformers: the same logits, the same loss, the same weights back."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, dynamic_module_utils

import convert_from_hf
import convert_to_hf
import prepare_data
from cluster import Cluster, Result
from hf_checkpoint import MegatronCheckpoint
from hf_checkpoint_writer import write_checkpoint
from hf_loss import Windows, mean_loss
from hf_unpickling import StandIn
from layouts import PP2, SEQUENCE, VPP, Layout

RANK = 16
ONE = "model.safetensors"
SAMPLES = 16  # of an evaluation

SAVE_ONCE = "--save-interval 1000 --ckpt-format torch_dist"
EVALUATION = f"--eval-global-batch-size {SAMPLES}"
ROPE_SCALING = "--rotary-base 5000 --use-rope-scaling --rope-scaling-factor 4"
WITH_DATA = Layout(
    4, f"{PP2} --tensor-model-parallel-size 2", without=("--mock-data", "--split", "90,5,5")
)
TIED = Layout(2, f"{PP2} {VPP}", without=("--untie-embeddings-and-output-weights",))


@dataclass
class Trained:
    """A model that was trained and saved, and what Megatron made of the validation data."""

    folder: Path
    result: Result
    data: Path | None = None

    @property
    def ids(self) -> Tensor:
        """[n, s] of the first evaluation."""
        ids = next(record["ids"] for record in self.result.records if record["ids"])
        return torch.cat(ids[: len(ids) // 2])

    @property
    def logits(self) -> Tensor:
        """[n, s, V] of the trained model for `ids`; the vocabulary's parts put together."""
        parts = [
            torch.cat(record["logits"][: len(record["logits"]) // 2], 1).transpose(0, 1)
            for record in self.result.records
            if record["logits"]
        ]
        return torch.cat(parts, -1)


def train(cluster: Cluster, folder: Path, layout: Layout, *more: str) -> Trained:
    command = layout.bare_command(SAVE_ONCE, EVALUATION, f"--save {folder}", *more)
    return Trained(folder, cluster.run(layout.world_size, command, tamper="note_logits"))


def export(trained: Trained, output: Path, *more: str) -> Path:
    assert convert_to_hf.main(["--load", str(trained.folder), "--output", str(output), *more]) == 0
    return output


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


def largest(numbers: Tensor) -> str:
    return f"{float(numbers.abs().max()):.1e}"


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers keeps the modelling code that it loads: not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("code"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in a tokenizer of its own; the validation part is one evaluation, of one document."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(prepare_data.__file__).read_text() + Path(convert_to_hf.__file__).read_text()
    for number in range(8):
        (folder / f"{number}.txt").write_text(text[number * 2000 : number * 2000 + 6000])
    prefix = folder / "data"
    sizes = ["--vocab-size", "512", "--valid-fraction", "0.5", "--workers", "1"]
    assert prepare_data.main(["--input", str(folder), "--output-prefix", str(prefix), *sizes]) == 0
    datasets = prepare_data._import_indexed_dataset()
    tokens = np.fromfile(f"{prefix}_valid.bin", np.uint16)[: SAMPLES * SEQUENCE + 1]
    assert len(tokens) == SAMPLES * SEQUENCE + 1
    short = folder / "short"
    builder = datasets.IndexedDatasetBuilder(f"{short}.bin", dtype=np.uint16)
    builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
    builder.finalize(f"{short}.idx")
    return prefix


@pytest.fixture(scope="module")
def defaults(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """TP2 × PP2, fp32, bigram anchors and int8 as by default, grouped queries, a real tokenizer."""
    short = corpus.with_name("short")
    data = (
        f"--train-data-path {corpus}_train --valid-data-path {short} --test-data-path {short} "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {corpus}.model "
        f"--data-cache-path {corpus}-cache "
        "--train-iters 12 --group-query-attention --num-query-groups 2"
    )
    folder = tmp_path_factory.mktemp("defaults")
    trained = train(cluster, folder, WITH_DATA, data, f"--mapl-rank {RANK}")
    trained.data = short
    return trained


@pytest.fixture(scope="module")
def paper(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """PP2 × VPP2, bf16, the paper's boundaries, tied embeddings, Llama 3's rotary scaling."""
    folder = tmp_path_factory.mktemp("paper")
    more = f"--mapl-preset paper --mapl-rank {RANK} --bf16 --vocab-size 200 {ROPE_SCALING}"
    return train(cluster, folder, TIED, more)


#: Flags of jobs of one process → what of an export they try.
VARIANTS = {
    "subspace": "--mapl-rank 16 --mapl-projector subspace --mapl-anchor static",
    "full-fp8-uneven": "--mapl-rank 0 8 0 --mapl-anchor full --mapl-forward-codec fp8",
    "rvq": "--mapl-rank 16 --mapl-anchor factorized --mapl-forward-codec rvq --mapl-rvq-codes 16 "
    "--mapl-rvq-sync full",
    "no-projector": "--mapl-rank 64 --mapl-projector none --mapl-anchor none "
    "--mapl-forward-codec int4",
    "topk": "--mapl-rank 16 --mapl-anchor none --mapl-forward-codec topk --mapl-topk 12 "
    "--mapl-projector unconstrained",
}


@pytest.fixture(scope="module")
def exact(defaults: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(defaults, tmp_path_factory.mktemp("hf") / "exact", "--data", str(defaults.data))


@pytest.fixture(scope="module")
def plain(defaults: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["--export", "plain", "--data", str(defaults.data), "--max-shard-size", "100KB"]
    return export(defaults, tmp_path_factory.mktemp("hf") / "plain", *more)


def test_exact_logits_are_those_of_training(defaults: Trained, exact: Path) -> None:
    """In fp32 to the last digits, though int8 rounds: no code flipped here."""
    found = logits_of(load(exact), defaults.ids)
    print(f"fp32: {largest(found - defaults.logits)} of logits up to {largest(found)}")
    torch.testing.assert_close(found, defaults.logits, rtol=0, atol=3e-6)


def test_data_parallelism_and_the_distributed_optimizer(cluster: Cluster, tmp_path: Path) -> None:
    """PP2 × DP2: each replica's own samples, from one export."""
    layout = Layout(4, f"{PP2} --use-distributed-optimizer --mapl-rank {RANK}")
    trained = train(cluster, tmp_path / "megatron", layout)
    model = load(export(trained, tmp_path / "exact"))
    replicas = [
        [record[what] for record in trained.result.records if record[what]]
        for what in ("ids", "logits")
    ]
    assert len(replicas[0]) == 2
    for ids, logits in zip(*replicas, strict=True):
        found = logits_of(model, torch.cat(ids))
        difference = (found - torch.cat(logits, 1).transpose(0, 1)[..., :255]).abs().amax(-1)
        print(f"PP2 × DP2: {largest(difference)}")
        assert (difference < 1e-5).float().mean() > 0.95
        assert difference.max() < 0.05


def test_it_loads_without_this_project(exact: Path, defaults: Trained, tmp_path: Path) -> None:
    """In a process that has torch and transformers alone."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids = torch.load(sys.argv[2])\n"
        "torch.save(model(ids, use_cache=False).logits.detach(), sys.argv[3])\n"
        "ours = {'mapl', 'mapl_llama', 'megatron', 'hf_weights', 'convert_to_hf'}\n"
        "assert ours.isdisjoint(name.partition('.')[0] for name in sys.modules)\n"
    )
    ids, logits = tmp_path / "ids", tmp_path / "logits"
    torch.save(defaults.ids[:2], ids)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", code, str(exact), str(ids), str(logits)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    torch.testing.assert_close(torch.load(logits), defaults.logits[:2], rtol=0, atol=3e-6)


def test_loss_is_megatrons_validation_loss(defaults: Trained, exact: Path) -> None:
    """And so is the perplexity, exp of it. The vocabulary of 512 has no padding."""
    record = json.loads((exact / "mapl_conversion.json").read_text())
    print(f"loss: {record['loss']['trained']}, Megatron's {defaults.result.validation[0]}")
    assert record["loss"]["trained"] == pytest.approx(defaults.result.validation[0], rel=1e-6)
    assert record["data"]["samples"] == SAMPLES
    model = load(exact)
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in defaults.ids]
    expected = torch.nn.functional.cross_entropy(
        defaults.logits[:, :-1].flatten(0, 1), defaults.ids[:, 1:].flatten()
    )
    assert sum(losses) / len(losses) == pytest.approx(float(expected), rel=1e-5)


def test_bf16_logits_are_equal_to_rounding(
    paper: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding of the vocabulary is cut off; transformers rounds in other places than Megatron."""
    model = load(export(paper, tmp_path / "exact"))
    assert "exact export of step 4" in capsys.readouterr().out
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 200
    assert [boundary["layer"] for boundary in model.config.mapl_boundaries] == [1, 2, 3]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = paper.logits[..., :200].float()
    found, wide = logits_of(model, paper.ids).float(), logits_of(model.float(), paper.ids)
    rounding = (found - wide).norm()
    parts = [float(part / wide.norm()) for part in ((found - expected).norm(), rounding)]
    print(f"bf16: {parts[0]:.2%}, and {parts[1]:.2%} by rounding alone")
    # Megatron's loss takes the rows that pad the vocabulary for tokens too.
    ids = paper.ids[:, 1:].flatten()
    padded, unpadded = (
        float(torch.nn.functional.cross_entropy(part[:, :-1].flatten(0, 1), ids))
        for part in (paper.logits.float(), expected)
    )
    print(f"loss: {padded:.4f} with {paper.logits.shape[-1]} rows, {unpadded:.4f} with 200")
    assert unpadded < padded
    assert (found - expected).norm() < 2 * rounding
    assert (wide - expected).norm() < 1.5 * rounding < 0.02 * wide.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_other_boundaries(cluster: Cluster, tmp_path: Path, name: str) -> None:
    more = f"--mapl-virtual-stages 4 {VARIANTS[name]} --mapl-backward-codec int8"
    trained = train(cluster, tmp_path / "megatron", Layout(1, more))
    model = load(export(trained, tmp_path / "exact"))
    difference = (logits_of(model, trained.ids) - trained.logits[..., :255]).abs().amax(-1)
    print(f"{name}: {largest(difference)}")
    if name == "full-fp8-uneven":  # whose first and last stage are at no compressed boundary
        assert len(model.model.anchors) == model.config.mapl_stages == 2
        assert [boundary["layer"] for boundary in model.config.mapl_boundaries] == [2]
    # Where a number lies on the edge between two codes, the last bit of a GEMM decides; then this
    # token's logits, and a little the later ones', are another rounding's.
    assert (difference < 1e-5).float().mean() > 0.95
    assert difference.max() < 0.05
    for layer in model.model.layers:
        layer.boundary = None
    plain = logits_of(model, trained.ids)
    if name != "subspace":  # whose boundaries lose nothing but by int8
        assert (plain - trained.logits[..., :255]).abs().max() > 10 * difference.max()
    folder = export(trained, tmp_path / "plain", "--export", "plain")
    torch.testing.assert_close(
        logits_of(LlamaForCausalLM.from_pretrained(folder), trained.ids), plain
    )


def test_generation_with_a_cache(exact: Path) -> None:
    """Bigram anchors need the token before the new one, which the cache does not hold."""
    model = load(exact)
    prompt = torch.randint(5, 500, (2, 7), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    settings |= {"pad_token_id": 3, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(prompt, **settings)
    plainly = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plainly.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plainly.logits))
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static.sequences, plainly.sequences)
    beams = [
        model.generate(prompt, num_beams=3, use_cache=cache, **settings).sequences
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padding_changes_nothing(exact: Path, beams: int) -> None:
    """Two prompts of different lengths in one batch, and each by itself."""
    model = load(exact)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, 500, (1, length), generator=generator) for length in (7, 4)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    settings |= {"pad_token_id": 3, "num_beams": beams}

    def padded(prompt: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(prompt, (11 - prompt.shape[1], 0), value=value)

    batch = torch.cat([padded(prompt, 3) for prompt in prompts])
    mask = torch.cat([padded(torch.ones_like(prompt), 0) for prompt in prompts])
    beside = model.generate(batch, attention_mask=mask, **settings)
    for prompt, found in zip(prompts, beside, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(alone[0], found[11 - prompt.shape[1] :])


def test_what_would_lose_a_predecessor_is_refused(exact: Path) -> None:
    model = load(exact)
    ids = torch.arange(5, 13)[None]
    first = model(ids[:, :4])
    with pytest.raises(ValueError, match="give predecessors"):
        model(ids[:, 4:], past_key_values=first.past_key_values)
    found = model(ids[:, 4:], past_key_values=first.past_key_values, predecessors=ids[:, 3:-1])
    torch.testing.assert_close(found.logits, model(ids).logits[:, 4:])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=3)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64))


def test_plain_export(plain: Path, defaults: Trained, exact: Path) -> None:
    """Sharded; a LLaMA like any other, with another loss, which is the one that is said."""
    assert len(list(plain.glob("model-*.safetensors"))) > 1
    assert not list(plain.glob("*.py")) and not (plain / "exact").exists()
    model = LlamaForCausalLM.from_pretrained(plain).eval()
    assert set(model.state_dict()) < set(load(exact).state_dict())
    losses = json.loads((plain / "mapl_conversion.json").read_text())["loss"]
    assert losses == json.loads((exact / "mapl_conversion.json").read_text())["loss"]
    assert losses["plain"] > losses["trained"]
    assert defaults.data is not None
    samples = Windows(defaults.data, SEQUENCE, None, 512)
    assert mean_loss(model, samples, "") == pytest.approx(losses["plain"], rel=1e-6)
    prompt = defaults.ids[:1, :5]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_tokenizer(exact: Path, corpus: Path) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=f"{corpus}.model")
    tokenizer = AutoTokenizer.from_pretrained(exact)
    text = Path(__file__).read_text()
    assert tokenizer(text).input_ids == original.encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == original.eos_id() == load(exact).generation_config.eos_token_id


def model_tensors(checkpoint: MegatronCheckpoint) -> dict[str, Tensor]:
    ours = ("mapl.", "optimizer.", "chained_")
    keys = [key for key in checkpoint.tensors if not key.startswith(ours)]
    return {key: checkpoint.read(key) for key in keys}


def model_objects(checkpoint: MegatronCheckpoint) -> set[str]:
    """The keys of what is no tensor, but of the state of a run."""
    ours = ("rng_state", "rerun_state", "optimizer", "chained_")
    return {key for key in checkpoint._objects if not key.startswith(ours)}


@pytest.mark.parametrize("which", ["defaults", "paper"])
def test_round_trips(request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    """Megatron → Hugging Face → Megatron → Hugging Face: the same bits, without padding."""
    trained: Trained = request.getfixturevalue(which)
    first = export(trained, tmp_path / "first", "--export", "plain")
    back = tmp_path / "back"
    assert convert_from_hf.main(["--hf-model", str(first), "--output", str(back)]) == 0
    before, after = MegatronCheckpoint(trained.folder), MegatronCheckpoint(back)
    size = after.shape("embedding.word_embeddings.weight")[0]
    expected, found = model_tensors(before), model_tensors(after)
    assert expected.keys() == found.keys()
    assert model_objects(before) == model_objects(after)
    for key, tensor in expected.items():
        if key.startswith("decoder.layers."):  # each is read by itself
            assert len(after.tensors[key].chunks) == len(tensor)
        whole = key.startswith("decoder.")
        assert torch.equal(tensor if whole else tensor[:size], found[key]), key
    again = export(Trained(back, trained.result), tmp_path / "again")
    for file in first.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, load_file(again / file.name)[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (first / name).read_text() == (again / name).read_text()


def test_layers_that_are_stored_one_by_one(defaults: Trained, plain: Path, tmp_path: Path) -> None:
    """As Megatron does where layers differ; no stack is there to be cut."""
    stacked = MegatronCheckpoint(defaults.folder)
    tensors = {}
    for key, tensor in model_tensors(stacked).items():
        if key.startswith("decoder.layers."):
            suffix = key.removeprefix("decoder.layers.")
            tensors |= {f"decoder.layers.{n}.{suffix}": part for n, part in enumerate(tensor)}
        else:
            tensors[key] = tensor
    (tmp_path / "single").mkdir()
    args = {k: v for k, v in vars(stacked.args).items() if not isinstance(v, StandIn)}
    write_checkpoint(tmp_path / "single", tensors, argparse.Namespace(**args), ())
    found = load_file(export(Trained(tmp_path / "single", defaults.result), tmp_path / "hf") / ONE)
    expected = {k: v for f in plain.glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def imported(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The plain export as a Megatron checkpoint, and the flags that its conversion says."""
    output = tmp_path_factory.mktemp("megatron") / "imported"
    command = ["--hf-model", str(plain), "--output", str(output), "--seq-length", str(SEQUENCE)]
    words = convert_from_hf.convert(convert_from_hf._parse(command))
    assert shlex.split(shlex.join(words)) == words
    return output, words


RUN = (
    f"--micro-batch-size 2 --global-batch-size {SAMPLES} --train-iters 2 --lr 1e-4 "
    "--log-interval 1 --eval-iters 1 --eval-interval 100 --num-workers 0"
)


def validation(cluster: Cluster, words: list[str], corpus: Path, layout: str) -> float:
    """Megatron's validation loss of a model that was imported."""
    short = corpus.with_name("short")
    data = f"--train-data-path {corpus}_train --valid-data-path {short} --test-data-path {short}"
    cache = f"--data-cache-path {corpus}-cache --skip-train"
    processes = 4 if "tensor" in layout else 2
    result = cluster.run(processes, [*words, *f"{RUN} {data} {cache} {layout}".split()])
    return result.validation[0]


def test_megatron_loads_it(
    cluster: Cluster, imported: tuple[Path, list[str]], plain: Path, corpus: Path
) -> None:
    """With the loss that the model has in transformers."""
    found = validation(cluster, imported[1], corpus, f"{PP2} --tensor-model-parallel-size 2")
    expected = json.loads((plain / "mapl_conversion.json").read_text())["loss"]["plain"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_rows_that_no_token_has_are_kept(
    cluster: Cluster, plain: Path, corpus: Path, tmp_path: Path
) -> None:
    """516 rows and a tokenizer of 512: Megatron by itself would drop four, and change the loss."""
    model = LlamaForCausalLM.from_pretrained(plain)
    model.resize_token_embeddings(516, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "wide")
    output = tmp_path / "imported"
    command = f"--hf-model {tmp_path}/wide --output {output} --seq-length {SEQUENCE}".split()
    words = convert_from_hf.convert(convert_from_hf._parse(command))
    assert words[words.index("--padded-vocab-size") + 1] == "516"
    expected = mean_loss(model, Windows(corpus.with_name("short"), SEQUENCE, None, 512), "")
    found = validation(cluster, words, corpus, f"{PP2} {VPP}")
    assert found == pytest.approx(expected, rel=1e-6)


def test_training_goes_on_through_fresh_boundaries(
    cluster: Cluster, imported: tuple[Path, list[str]], plain: Path, corpus: Path
) -> None:
    data = f"--train-data-path {corpus}_train --valid-data-path {corpus}_valid {PP2}"
    data += f" --test-data-path {corpus}_valid --data-cache-path {corpus}-cache"
    boundaries = "--mapl-rank 64 --mapl-checkpoint fresh"  # square projectors lose nothing at first
    result = cluster.run(2, [*imported[1], *f"{RUN} {data} {boundaries}".split()])
    assert "start anew, because it holds a model without MAPL boundaries" in result.log
    trained = json.loads((plain / "mapl_conversion.json").read_text())["loss"]["plain"]
    assert len(result.losses) == 2
    assert result.losses[0] < trained + 0.3  # and not that of random weights, 6.24


def test_nothing_half_written(defaults: Trained, exact: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(*more: str) -> str:
        command = ["--load", str(defaults.folder), "--output", str(tmp_path / "out"), *more]
        assert convert_to_hf.main(command) == 2
        error: str = capsys.readouterr().err
        assert error.startswith("convert_to_hf.py: error: ") and error.count("\n") == 1
        assert not list(tmp_path.glob("*"))
        return error

    assert "--data /nowhere" in refused("--data", "/nowhere")
    assert "/nowhere, is not on this machine" in refused("--tokenizer-model", "/nowhere")
    assert convert_to_hf.main(["--load", str(defaults.folder), "--output", str(exact)]) == 2
    assert f"--output {exact} exists" in capsys.readouterr().err
    assert "is an exact export" in imported_error(exact, tmp_path / "out", capsys)
    moved = tmp_path / "more"
    moved.mkdir()
    (moved / "config.json").write_text(json.dumps({"model_type": "llama", "attention_bias": True}))
    assert "attention_bias True" in imported_error(moved, tmp_path / "out", capsys)


def imported_error(model: Path, output: Path, capsys: Any) -> str:
    assert convert_from_hf.main(["--hf-model", str(model), "--output", str(output)]) == 2
    assert not output.exists()
    return str(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--qk-layernorm", "--qk-layernorm"),
        ("--normalization LayerNorm", "--normalization LayerNorm"),
        ("--num-experts 2", "--num-experts 2"),
        ("--rotary-percent 0.5", "--rotary-percent 0.5"),
    ],
)
def test_what_is_no_llama_is_refused(
    cluster: Cluster, tmp_path: Path, capsys: Any, more: str, said: str
) -> None:
    trained = train(cluster, tmp_path / "megatron", Layout(1, f"--train-iters 1 {more}"))
    command = ["--load", str(trained.folder), "--output", str(tmp_path / "out")]
    assert convert_to_hf.main(command) == 2
    assert f"was trained with {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_without_a_place_are_refused(plain: Path, tmp_path: Path, capsys: Any) -> None:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    extra = "model.layers.0.self_attn.q_proj.bias"
    index["weight_map"][extra] = "extra.safetensors"
    save_file({extra: torch.zeros(64)}, tmp_path / "extra.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert extra in imported_error(tmp_path, tmp_path / "out", capsys)
