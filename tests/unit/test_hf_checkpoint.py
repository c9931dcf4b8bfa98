# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are written, broken or hostile, and outputs that cannot be replaced."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import convert_from_hf
from hf_checkpoint import MegatronCheckpoint
from hf_checkpoint_writer import write_checkpoint
from hf_errors import ConversionError
from hf_output import check_free, new_folder

LAYERS = 5


@pytest.fixture
def written(tmp_path: Path) -> Path:
    stack = [torch.full((3, 2), float(layer)) for layer in range(LAYERS)]
    tensors: dict[str, Any] = {"single": torch.arange(4.0), "stack": stack}
    write_checkpoint(tmp_path, tensors, argparse.Namespace(num_layers=LAYERS), ["module"])
    return tmp_path


def test_each_layer_is_a_chunk(written: Path) -> None:
    checkpoint = MegatronCheckpoint(written)
    chunks = checkpoint.tensors["stack"].chunks
    assert len(chunks) == LAYERS
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [
        (layer, 0, 0, 1, 3, 2) for layer in range(LAYERS)
    ]
    assert checkpoint.shape("stack") == (LAYERS, 3, 2)
    assert torch.equal(checkpoint.read("stack", 3), torch.full((3, 2), 3.0))
    assert torch.equal(checkpoint.read("stack")[:, 0, 0], torch.arange(5.0))
    assert torch.equal(checkpoint.read("single"), torch.arange(4.0))


class Calls:
    """Pickles as a call of a function that is not where its name seems to say."""

    def __init__(self, module: str, name: str, *args: Any) -> None:
        self.module, self.name, self.args = module, name, args

    def pickled(self) -> bytes:
        words = [self.module, self.name]
        names = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in words)
        rest = pickle.dumps(self.args, protocol=4)[2:-1]
        return b"\x80\x04" + names + b"\x93" + rest + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("torch._utils", "logging.os.system"), ("collections", "_sys.exit")],
)
@pytest.mark.parametrize("place", [".metadata", "common.pt"])
def test_pickles_run_nothing(written: Path, module: str, name: str, place: str) -> None:
    mark = written / "ran"
    payload = Calls(module, name, f"touch {mark}").pickled()
    (written / "release" / place).write_bytes(payload)
    with pytest.raises(ConversionError, match=place):
        MegatronCheckpoint(written)
    assert not mark.exists()


def test_payloads_would_run(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    mark = tmp_path / "ran"
    pickle.loads(Calls("torch._utils", "logging.os.system", f"touch {mark}").pickled())
    assert mark.exists()


@pytest.mark.parametrize("place", [".metadata", "metadata.json"])
def test_broken_files_are_named(written: Path, place: str) -> None:
    file = written / "release" / place
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ConversionError, match=place):
        MegatronCheckpoint(written)


def test_a_link_to_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(ConversionError, match="is the working directory"):
            check_free(path)


def a_llama(folder: Path, **more: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        **more,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def a_tokenizer(folder: Path, tokens: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)


def words_of(model: Path, *more: str) -> list[str]:
    command = ["--hf-model", str(model), "--output", str(model / "out"), *more]
    return convert_from_hf.convert(convert_from_hf._parse(command))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "{", "config.json is no JSON"),
        ("config.json", "[]", "config.json is no JSON object"),
        (
            "config.json",
            '{"model_type": "llama", "hidden_size": "wide"}',
            "config.json is no LLaMA",
        ),
        ("model.safetensors.index.json", "{", "index.json is no JSON"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "names b, which is not"),
        ("model.safetensors", "broken", "model.safetensors cannot be read"),
        ("tokenizer.json", "{", "the tokenizer in --hf-model"),
        ("tokenizer.model", "?", "tokenizer.model is no SentencePiece"),
    ],
)
def test_models_that_are_broken(tmp_path: Path, file: str, content: str, said: str) -> None:
    model = a_llama(tmp_path / "m")
    (model / file).write_text(content)
    with pytest.raises(ConversionError, match=said):
        words_of(model)
    assert not (model / "out").exists() and not list(model.glob(".out*"))


def test_a_sequence_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"--seq-length 65 .* at most 64"):
        words_of(a_llama(tmp_path / "m"), "--seq-length", "65")


def test_a_tokenizer_and_an_embedding(tmp_path: Path) -> None:
    model = a_llama(tmp_path / "m")
    a_tokenizer(model, 21)
    with pytest.raises(ConversionError, match="21 tokens, and the embedding 20 rows"):
        words_of(model)
    a_tokenizer(model, 20)
    assert "--padded-vocab-size" not in words_of(model)
    (model / "out").rename(tmp_path / "away")
    a_tokenizer(model, 17)
    words = words_of(model)
    assert words[words.index("--padded-vocab-size") + 1] == "20"
    assert "--vocab-size" not in words


def test_weights_of_another_configuration(tmp_path: Path) -> None:
    model = a_llama(tmp_path / "m")
    file = model / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 20', '"vocab_size": 24'))
    with pytest.raises(ConversionError, match=r"embed_tokens.weight has shape \[20, 8\]"):
        words_of(model)
