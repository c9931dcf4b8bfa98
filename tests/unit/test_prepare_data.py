# SPDX-License-Identifier: Apache-2.0
"""tools/prepare_data.py: what goes in comes out of the dataset, whole or not at all."""

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

import data_output
import prepare_data
from data_tokenizer import TrainingSample

TOOL = Path(prepare_data.__file__)
VOCABULARY = "400"


def make_documents(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]
    documents = []
    for number in range(count):
        lines = [f"def {rng.choice(words)}_{number}(x):"]
        for _ in range(rng.randint(5, 20)):
            indent = rng.choice(["", "    ", "        ", "\t", "\t  "])
            lines.append(indent + " ".join(rng.choices(words, k=rng.randint(1, 9))))
        documents.append("\n".join(lines) + "\n")
    documents[0] = "  first\r\n\n\n\ttab  two\u00a0é 漢字 \U0001f600\n    end  "
    return documents


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return make_documents(120)


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", documents)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A SentencePiece model, as an existing tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    source = write_jsonl(folder / "corpus.jsonl", documents)
    assert prepare(source, folder / "data", "--vocab-size", VOCABULARY) == 0
    return folder / "data.model"


def prepare(source: Path, prefix: Path, *options: object, workers: int = 1) -> int:
    command = ["--input", source, "--output-prefix", prefix, "--workers", workers, *options]
    return prepare_data.main([str(part) for part in command])


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1
    return [dataset[index].tolist() for index in range(len(dataset))]


def megatron_tokenizer(kind: str, model: Path) -> object:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = SimpleNamespace(
        tokenizer_type=kind,
        tokenizer_model=str(model),
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        vocab_file=None,
        merge_file=None,
        tokenizer_hf_no_use_fast=False,
        trust_remote_code=False,
        tokenizer_hf_no_include_special_tokens=False,
        metadata_path=None,
        pad_vocab_size=False,
    )
    return build_tokenizer(args)


def contents(prefix: Path) -> dict[str, bytes]:
    found = prefix.parent.glob(prefix.name + "*")
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in found}


def refused(capsys: pytest.CaptureFixture[str], *parts: object) -> str:
    """The single line on stderr after a run that exited with code 2."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("training a tokenizer")]
    assert len(lines) == 1 and lines[0].startswith("prepare_data.py: error: "), err
    for part in parts:
        assert str(part) in lines[0]
    return lines[0]


def test_round_trip_through_megatron(tmp_path: Path, corpus: Path, documents: list[str]) -> None:
    prefix = tmp_path / "data"
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 0
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", tmp_path / "data.model")
    assert tokenizer.vocab_size == int(VOCABULARY)
    sequences = read(prefix)
    assert len(sequences) == len(documents)
    for ids, text in zip(sequences, documents, strict=True):
        assert ids == [*tokenizer.tokenize(text), tokenizer.eod]
        assert tokenizer.eod not in ids[:-1]
        assert tokenizer.detokenize(ids[:-1]) == text


def test_megatron_trains_on_it(tmp_path: Path, corpus: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = tmp_path / "data"
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 0
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", tmp_path / "data.model")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    indexed = IndexedDataset(str(prefix))
    every = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), every, 10, Split.train, config)
    sample = dataset[0]
    assert sample["tokens"].shape == (32,)
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_workers_and_repetition_change_nothing(tmp_path: Path, documents: list[str]) -> None:
    # Enough text for several batches.
    corpus = write_jsonl(tmp_path / "big.jsonl", documents * 20)
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        prefix = tmp_path / name / "data"
        assert prepare(corpus, prefix, "--vocab-size", VOCABULARY, workers=workers) == 0
    first = contents(tmp_path / "one" / "data")
    assert sorted(first) == [".bin", ".idx", ".json", ".model"]
    assert contents(tmp_path / "again" / "data") == first
    assert contents(tmp_path / "two" / "data") == first


def test_all_kinds_of_input_give_the_same_tokens(
    tmp_path: Path, documents: list[str], model: Path
) -> None:
    folder = tmp_path / "files"
    for number, text in enumerate(documents):
        path = folder / f"part{number // 50}" / f"{number:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    plain = write_jsonl(tmp_path / "plain.jsonl", documents)
    packed_xz = tmp_path / "packed.jsonl.xz"
    packed_xz.write_bytes(lzma.compress(plain.read_bytes()))
    packed_gz = tmp_path / "packed.jsonl.gz"
    packed_gz.write_bytes(gzip.compress(plain.read_bytes()))
    for number, source in enumerate([folder, plain, packed_xz, packed_gz]):
        assert prepare(source, tmp_path / f"out{number}", "--tokenizer-model", model) == 0
    expected = contents(tmp_path / "out0")
    assert ".model" not in expected
    for number in (1, 2, 3):
        found = contents(tmp_path / f"out{number}")
        assert (found[".bin"], found[".idx"]) == (expected[".bin"], expected[".idx"])


def test_outputs_within_the_input_directory_are_no_input(tmp_path: Path, corpus: Path) -> None:
    prefix = tmp_path / "corpus"
    assert prepare(tmp_path, prefix, "--vocab-size", VOCABULARY) == 0
    before = contents(prefix)
    assert prepare(tmp_path, prefix, "--vocab-size", VOCABULARY) == 0
    assert contents(prefix) == before


def test_hugging_face_tokenizer(tmp_path: Path, corpus: Path, documents: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>"
    ).save_pretrained(folder)
    prefix = tmp_path / "data"
    options = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    assert prepare(corpus, prefix, *options) == 0
    reference = megatron_tokenizer("HuggingFaceTokenizer", folder)
    for ids, text in zip(read(prefix), documents, strict=True):
        assert ids == [*reference.tokenize(text), reference.eod]
        assert tokenizer.decode(ids) == text


def test_a_tokenizer_without_an_end_token(
    tmp_path: Path, corpus: Path, documents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import sentencepiece

    with (tmp_path / "endless.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=stream,
            vocab_size=400,
            model_type="bpe",
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    prefix = tmp_path / "data"
    option = ("--tokenizer-model", tmp_path / "endless.model")
    assert prepare(corpus, prefix, *option) == 2
    refused(capsys, "endless.model", "--no-append-eod")
    assert prepare(corpus, prefix, *option, "--no-append-eod") == 0
    assert len(read(prefix)) == len(documents)


def test_split_is_disjoint_and_complete(
    tmp_path: Path, corpus: Path, documents: list[str], model: Path
) -> None:
    assert prepare(corpus, tmp_path / "all", "--tokenizer-model", model) == 0
    options = ("--tokenizer-model", model, "--valid-fraction", "0.05")
    assert prepare(corpus, tmp_path / "cut", *options) == 0
    train, valid = read(tmp_path / "cut_train"), read(tmp_path / "cut_valid")
    assert len(valid) == len(documents) * 5 // 100
    assert sorted(train + valid) == sorted(read(tmp_path / "all"))
    assert not any(ids in train for ids in valid)


def test_the_tokenizer_never_sees_the_validation_part(tmp_path: Path) -> None:
    documents = make_documents(40)
    documents[19] += "漢" * 500
    documents[39] += "漢" * 500
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    options = ("--vocab-size", VOCABULARY, "--valid-fraction", "1/20")
    assert prepare(corpus, tmp_path / "data", *options) == 0
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", tmp_path / "data.model")
    assert tokenizer.tokenize("漢") == tokenizer.tokenize("漢漢")[:3]  # bytes, not one piece


def test_empty_documents_and_binary_files_are_skipped_and_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("some text\n")
    (folder / "b.txt").write_text(" \n\t\n")
    (folder / "c.bin").write_bytes(b"\xff\xfe\x01")
    (folder / "d.bin").write_bytes(b"ab\0c")
    write_jsonl(folder / "e.jsonl", ["", "more text"])
    assert prepare(folder, tmp_path / "data", "--tokenizer-model", model) == 0
    out = capsys.readouterr().out
    assert "2 documents (skipped: 2 empty documents, 2 files that are not text)" in out
    assert len(read(tmp_path / "data")) == 2


def test_reuse_refuse_overwrite(
    tmp_path: Path, corpus: Path, documents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "data"
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 0
    before = {name: os.stat(f"{prefix}{name}").st_mtime_ns for name in contents(prefix)}
    capsys.readouterr()
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 0
    assert "is up to date" in capsys.readouterr().out
    assert before == {name: os.stat(f"{prefix}{name}").st_mtime_ns for name in contents(prefix)}

    assert prepare(corpus, prefix, "--vocab-size", 380) == 2
    refused(capsys, "vocab_size", "--overwrite", prefix)
    write_jsonl(corpus, documents[1:])
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 2
    refused(capsys, "input_sha256", "--overwrite")
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY, "--overwrite") == 0
    assert len(read(prefix)) == len(documents) - 1

    # A dataset in parts leaves nothing of the one that it replaces.
    options = ("--vocab-size", VOCABULARY, "--overwrite", "--valid-fraction", "0.1")
    assert prepare(corpus, prefix, *options) == 0
    expected = ["_train.bin", "_train.idx", "_valid.bin", "_valid.idx", ".json", ".model"]
    assert sorted(contents(prefix)) == sorted(expected)


def test_damaged_and_foreign_outputs_are_refused(
    tmp_path: Path, corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, data = tmp_path / "data", tmp_path / "data.bin"
    option = ("--tokenizer-model", model)
    data.write_bytes(b"mine")
    assert prepare(corpus, prefix, *option) == 2
    refused(capsys, data, "--overwrite")
    assert data.read_bytes() == b"mine"
    assert prepare(corpus, prefix, *option, "--overwrite") == 0
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + b"\x01")
    capsys.readouterr()
    assert prepare(corpus, prefix, *option) == 2
    refused(capsys, data, "--overwrite")
    assert prepare(corpus, prefix, *option, "--overwrite") == 0
    assert data.read_bytes() == whole
    capsys.readouterr()
    (tmp_path / "data.json").write_text("[1, 2]")
    assert prepare(corpus, prefix, *option, "--overwrite") == 2
    refused(capsys, "data.json")


def test_overwriting_keeps_the_tokenizer_in_use(tmp_path: Path, corpus: Path) -> None:
    prefix = tmp_path / "data"
    assert prepare(corpus, prefix, "--vocab-size", VOCABULARY) == 0
    before = contents(prefix)
    assert prepare(corpus, prefix, "--tokenizer-model", f"{prefix}.model", "--overwrite") == 0
    after = contents(prefix)
    assert all(after[name] == before[name] for name in (".bin", ".idx", ".model"))


def test_killed_run_leaves_no_dataset(tmp_path: Path, model: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(120) * 100)
    prefix, partial = tmp_path / "killed" / "data", tmp_path / "killed" / "data.bin.tmp"
    command = [sys.executable, str(TOOL), "--input", str(corpus)]
    command += ["--output-prefix", str(prefix), "--tokenizer-model", str(model), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    left = set(contents(prefix))
    assert left and left <= {".bin.tmp", ".idx.tmp", ".lock"}
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive

    assert prepare(corpus, prefix, "--tokenizer-model", model) == 0
    assert prepare(corpus, tmp_path / "whole" / "data", "--tokenizer-model", model) == 0
    assert contents(prefix) == contents(tmp_path / "whole" / "data")


@pytest.mark.parametrize("replaces", [False, True])
def test_a_run_cut_off_while_publishing_is_ended_by_the_next(
    tmp_path: Path,
    corpus: Path,
    model: Path,
    replaces: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--tokenizer-model", model, "--valid-fraction", "0.1", "--overwrite")
    assert prepare(corpus, tmp_path / "whole" / "data", *options) == 0
    expected = contents(tmp_path / "whole" / "data")

    class Killed(BaseException):
        pass

    # One replacement makes the manifest ready, four publish the data, the last publishes it.
    for survived in range(6):
        prefix = tmp_path / f"cut{survived}" / "data"
        if replaces:
            assert prepare(corpus, prefix, "--tokenizer-model", model, "--overwrite") == 0
        replace, calls = os.replace, iter(range(6))

        def cut(old: Path, new: Path, survived=survived, calls=calls, replace=replace) -> None:
            if next(calls) == survived:
                raise Killed
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(data_output.os, "replace", cut)
            with pytest.raises(Killed):
                prepare(corpus, prefix, *options)
        if survived or not replaces:
            assert not (prefix.parent / "data.json").exists()
        assert prepare(corpus, prefix, *options) == 0
        assert contents(prefix) == expected


def test_two_runs_with_one_prefix(
    tmp_path: Path, corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "data"
    with data_output.OutputFiles(prefix).exclusive():
        assert prepare(corpus, prefix, "--tokenizer-model", model) == 2
        refused(capsys, prefix, "another run")
    assert prepare(corpus, prefix, "--tokenizer-model", model) == 0


def test_input_that_changes_meanwhile(
    tmp_path: Path,
    corpus: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = prepare_data._build

    def build_and_write(*args):
        manifest = build(*args)
        corpus.write_text(corpus.read_text() * 2)
        return manifest

    monkeypatch.setattr(prepare_data, "_build", build_and_write)
    assert prepare(corpus, tmp_path / "data", "--tokenizer-model", model) == 2
    refused(capsys, corpus, "changed")
    assert contents(tmp_path / "data") == {}


BAD_LINES = {
    "no key": ('{"content": "x"}', ["line 2", "'text'", "--json-key"]),
    "not a text": ('{"text": 7}', ["line 2", "'text'"]),
    "no object": ("[1]", ["line 2"]),
    "no JSON": ('{"text": "x"', ["line 2", "not JSON"]),
    "half a surrogate": ('{"text": "\\ud800"}', ["line 2", "Unicode"]),
}


@pytest.mark.parametrize("fault", BAD_LINES)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_json_lines(
    tmp_path: Path,
    model: Path,
    fault: str,
    workers: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, parts = BAD_LINES[fault]
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text(f'{{"text": "good"}}\n{line}\n')
    option = ("--tokenizer-model", model)
    assert prepare(corpus, tmp_path / "data", *option, workers=workers) == 2
    refused(capsys, corpus, *parts)
    assert contents(tmp_path / "data") == {}


def test_bad_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir()
    binary.mkdir()
    (binary / "a.txt").write_bytes(b"\xff\xff")
    (binary / "b.txt").write_bytes(b" \n")
    (tmp_path / "c.jsonl.zst").write_bytes(b"x")
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n')[:-8])
    (tmp_path / "e.jsonl.gz").write_bytes(b"not gzip")
    cases = {
        tmp_path / "missing": ["does not exist"],
        empty: ["no files"],
        binary: ["no text", "2 files 1", "1 documents are empty"],
        binary / "a.txt": ["not UTF-8"],
        tmp_path / "c.jsonl.zst": ["not supported", ".jsonl.xz"],
        tmp_path / "d.jsonl.xz": ["damaged"],
        tmp_path / "e.jsonl.gz": ["cannot read"],
    }
    for source, parts in cases.items():
        assert prepare(source, tmp_path / "data", "--vocab-size", VOCABULARY) == 2
        line = refused(capsys, *parts)
        assert str(source) in line or source == binary
        assert contents(tmp_path / "data") == {}


def test_bad_settings(
    tmp_path: Path, corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "data"
    cases: list[tuple[list[object], list[str]]] = [
        (["--vocab-size", 100_000], ["--vocab-size 100000", "at most"]),
        (["--vocab-size", 100], ["--vocab-size 100", "at least"]),
        (["--tokenizer-model", tmp_path / "none.model"], ["none.model", "does not exist"]),
        (["--tokenizer-model", corpus], ["corpus.jsonl", "no SentencePiece model"]),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path],
            ["--tokenizer-model", "no tokenizer"],
        ),
        (["--tokenizer-model", model, "--valid-fraction", "0.001"], ["--valid-fraction 0.001"]),
    ]
    for options, parts in cases:
        assert prepare(corpus, prefix, *options) == 2
        refused(capsys, *parts)
        assert contents(prefix) == {}


@pytest.mark.parametrize(
    "options, part",
    [
        (["--vocab-size", "0"], "--vocab-size: 0 is no whole number"),
        (["--workers", "x"], "--workers: x is no whole number"),
        (["--valid-fraction", "1.5"], "--valid-fraction: 1.5 is no number between"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "name its directory"),
        (["--tokenizer-model", "m", "--vocab-size", "9"], "--vocab-size 9"),
        (["--source", "stdlib"], "--source: not allowed with argument --input"),
        (["--no-such"], "--no-such"),
    ],
)
def test_bad_flags(options: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        prepare_data.main(["--input", "a", "--output-prefix", "b", *options])
    assert exit_info.value.code == 2
    refused(capsys, part)


def test_unwritable_output(
    tmp_path: Path, corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(corpus, corpus / "data", "--tokenizer-model", model) == 2
    refused(capsys, corpus, "check the path")
    assert prepare(corpus, tmp_path, "--tokenizer-model", model) == 2
    refused(capsys, "--output-prefix", tmp_path, "directory")


def test_stdlib_source(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    for name in ("b.py", "a.py", "sub/c.py", "site-packages/d.py", "note.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    command = ["--source", "stdlib", "--output-prefix", tmp_path / "data", "--workers", 1]
    command += ["--tokenizer-model", model]
    assert prepare_data.main([str(part) for part in command]) == 0
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    texts = [tokenizer.detokenize(ids[:-1]) for ids in read(tmp_path / "data")]
    assert texts == ["# a.py\n", "# b.py\n", "# sub/c.py\n"]


def test_training_sample_is_bounded_and_spread() -> None:
    sample = TrainingSample(limit=1000)
    lines = [f"line {number:05}" for number in range(1000)]
    sample.add("\n".join(lines))
    assert 400 < sum(map(len, sample.lines)) <= 1000
    assert sample.lines == lines[::16]
    sample = TrainingSample(limit=10_000)
    sample.add("x" * 5000)
    assert "".join(sample.lines) == "x" * 5000


def test_help_is_fast() -> None:
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--output-prefix" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "megatron.core", "transformers", "sentencepiece"})
