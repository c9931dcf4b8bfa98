# SPDX-License-Identifier: Apache-2.0
"""Megatron's arguments ↔ LlamaConfig, tokenizers and data that are refused, without any model."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers.dynamic_module_utils import get_relative_imports

import convert_to_hf
import mapl_llama
from hf_check import _NEEDED, check_llama, rounding_notes, sample_notes
from hf_config import flags, llama_settings, megatron_arguments, save_config
from hf_errors import ConversionError
from hf_loss import Windows
from hf_tokenizer import find_tokenizer

SETTINGS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 24,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("dest", _NEEDED)
def test_each_argument_that_no_llama_has_is_refused(dest: str) -> None:
    allowed, flag = _NEEDED[dest]
    check_llama(argparse.Namespace(**{dest: allowed[0]}))
    other: Any = not allowed[0] if isinstance(allowed[0], bool) else "another"
    with pytest.raises(ConversionError) as error:
        check_llama(argparse.Namespace(**{dest: other}))
    assert flag in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
    ids=["grouped, tied", "llama 3", "default"],
)
def test_settings_come_back(more: dict[str, Any]) -> None:
    config = LlamaConfig(**SETTINGS, **more, dtype=torch.bfloat16)
    args = argparse.Namespace(**megatron_arguments(config, 4096))
    back = LlamaConfig(**llama_settings(args, 300, torch.bfloat16))
    assert back.to_dict() == config.to_dict()
    check_llama(args)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "default", "rope_theta": 12345.0}])
def test_config_json_has_the_names_of_transformers_4(tmp_path: Path, rope: dict[str, Any]) -> None:
    """4.x would take the default base where it finds none under its own names."""
    config = LlamaConfig(**SETTINGS, rope_parameters=rope, dtype=torch.bfloat16)
    save_config(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert content["rope_theta"] == rope["rope_theta"]
    assert content["rope_scaling"] == (scaling if rope is LLAMA3 else None)
    assert content["torch_dtype"] == content["dtype"] == "bfloat16"
    assert content["rope_parameters"] == rope
    loaded = LlamaConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters == rope and loaded.dtype == torch.bfloat16
    args = argparse.Namespace(**megatron_arguments(loaded, 4096))
    again = LlamaConfig(**llama_settings(args, 300, torch.bfloat16))
    assert again.rope_parameters == rope


def test_transformers_4_finds_all_modelling_code() -> None:
    """It copies what the modelling file imports, and not what those files import in turn."""
    (folder,) = {Path(path).resolve() for path in mapl_llama.__path__}
    names = {file.stem for file in folder.glob("*.py")} - {"modeling_mapl_llama"}
    assert set(get_relative_imports(folder / "modeling_mapl_llama.py")) == names


def test_flags() -> None:
    config = LlamaConfig(**SETTINGS, num_key_value_heads=2, rope_parameters=LLAMA3)
    line = " ".join(flags(megatron_arguments(config, 4096)))
    for words in (
        "--num-layers 3",
        "--group-query-attention --num-query-groups 2",
        "--kv-channels 24",
        "--rotary-base 500000",
        "--use-rope-scaling --rope-scaling-factor 32.0",
        "--norm-epsilon 1e-06",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--seq-length 4096",
    ):
        assert words in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}}, "4096"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "10000.5"),
    ],
)
def test_configurations_that_megatron_has_no_flag_for(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError) as error:
        megatron_arguments(LlamaConfig(**SETTINGS, **more), 4096)
    assert said in str(error.value)


@pytest.mark.parametrize("prefix_space", [True, False])
def test_sentencepiece_models(tmp_path: Path, prefix_space: bool) -> None:
    text = Path(__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 4),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix_space,
        minloglevel=2,
    )
    args = argparse.Namespace(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "m.model")
    )
    found = find_tokenizer(args, None)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    found.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in (" a", "def f(x): é", "  b\n\tc"):
        assert loaded(sample).input_ids == original.encode(sample)
        assert loaded.decode(loaded(sample).input_ids) == sample
    assert found.size == 420
    assert found.special_ids()["eos_token_id"] == original.eos_id()


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    text = Path(__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "m"),
        model_type="unigram",
        vocab_size=200,
        minloglevel=2,
    )
    args = argparse.Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=None)
    with pytest.raises(ConversionError, match="is no BPE model"):
        find_tokenizer(args, tmp_path / "m.model")
    with pytest.raises(ConversionError, match="--tokenizer-model"):
        find_tokenizer(args, None)


def args_of(kind: str, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(tokenizer_type=kind, tokenizer_model=None, **more)


def a_tokenizer(folder: Path, *, bos: bool) -> Path:
    """A tokenizer of characters, which puts <s> before texts or does not."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2}, merges=[]))
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(folder)
    return folder


def test_tokens_that_only_training_added(tmp_path: Path) -> None:
    (tmp_path / "m.model").touch()
    more = {"special_tokens": ["<user>"], "tokenizer_sentencepiece_legacy": True}
    with pytest.raises(ConversionError, match="--tokenizer-special-tokens <user>"):
        find_tokenizer(args_of("SentencePieceTokenizer", **more), tmp_path / "m.model")
    place = a_tokenizer(tmp_path / "hf", bos=False)
    with pytest.raises(ConversionError, match="does not know <user>"):
        find_tokenizer(args_of("HuggingFaceTokenizer", special_tokens=["a", "<user>"]), place)
    known = args_of("HuggingFaceTokenizer", special_tokens=["a"])
    assert find_tokenizer(known, place).size == 3


def test_a_tokenizer_that_adds_more_than_training(tmp_path: Path) -> None:
    args = args_of("HuggingFaceTokenizer", tokenizer_hf_no_include_special_tokens=True)
    assert find_tokenizer(args, a_tokenizer(tmp_path / "none", bos=False)).size == 3
    with pytest.raises(ConversionError, match="--tokenizer-hf-no-include-special-tokens") as error:
        find_tokenizer(args, a_tokenizer(tmp_path / "bos", bos=True))
    assert "<s>" in str(error.value)


def test_notes() -> None:
    assert "--fp8-format hybrid" in rounding_notes(argparse.Namespace(fp8="hybrid", fp4=None))[0]
    assert rounding_notes(argparse.Namespace(fp8=None)) == []
    (note,) = sample_notes(argparse.Namespace(eod_mask_loss=True, reset_attention_mask=True))
    assert "--eod-mask-loss --reset-attention-mask" in note
    assert sample_notes(argparse.Namespace(eod_mask_loss=False)) == []


def test_windows_are_consecutive(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(8) + b"\x08" + bytes(20))
    np.arange(36, dtype=np.uint16).tofile(tmp_path / "d.bin")
    samples = Windows(tmp_path / "d", 8, None, 300)
    assert len(samples) == 4
    first, second = samples.batches(3)
    assert first.tolist() == [list(range(n * 8, n * 8 + 9)) for n in range(3)]
    assert second.tolist() == [list(range(24, 33))]
    assert len(Windows(tmp_path / "d", 8, 2, 17)) == 2  # which reach token 16 alone
    with pytest.raises(ConversionError, match="holds the token 16"):
        Windows(tmp_path / "d", 8, 2, 16)


def test_data_that_is_none(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(b"0" * 40)
    with pytest.raises(ConversionError, match="is no index of a Megatron dataset"):
        Windows(tmp_path / "d", 8, None, 300)


@pytest.mark.parametrize(
    "words", ["--data-samples 4", "--max-shard-size 0GB", "--max-shard-size much", "--export all"]
)
def test_flags_out_of_range(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        convert_to_hf.main(["--load", "a", "--output", "b", *words.split()])
    assert stop.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_to_hf.main(["--load", str(tmp_path), "--output", str(tmp_path / "b")]) == 2
    assert "no checkpoint of --ckpt-format torch_dist" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
