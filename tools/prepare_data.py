# SPDX-License-Identifier: Apache-2.0
"""Turn text into a Megatron dataset (PREFIX.bin, PREFIX.idx), with a tokenizer of its own.

    python tools/prepare_data.py --source stdlib --output-prefix data/stdlib --valid-fraction 0.02
    python tools/prepare_data.py --input corpus/ more.jsonl.xz --output-prefix data/mine \\
        --tokenizer-model tokenizer.model

The files depend on the input and the settings alone, never on --workers or the machine. They
appear all together, PREFIX.json (settings, digests, token counts) last. The same command given
again checks them and uses them as they are.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tqdm import tqdm

from cli import run
from data_arguments import Arguments, parse_arguments
from data_output import Manifest, OutputFiles
from data_sources import Corpus, DataError, find_inputs, stdlib_files
from data_tokenizer import (
    Encoded,
    TokenizerSpec,
    TrainingSample,
    encode_documents,
    train_sentencepiece,
)

# More text makes training slower and the model no better.
TRAINING_CHARACTERS = 50_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; faults that the user can mend are one line on stderr and exit code 2."""
    args = parse_arguments(argv, __doc__)
    return run(
        "prepare_data.py",
        lambda: prepare(args),
        faults=DataError,
        output=f"--output-prefix {args.output_prefix}",
        interrupted="run the same command again",
    )


def prepare(args: Arguments) -> None:
    """Make the dataset, or find that it is there already."""
    output = OutputFiles(args.output_prefix)
    if args.source == "stdlib":
        files = stdlib_files()
    else:
        files = find_inputs(args.input, exclude=output.all_paths())
    corpus = Corpus(files, args.json_key)
    settings = args.settings()
    suffixes = [f"{split}{kind}" for split in args.splits for kind in (".bin", ".idx")]
    if args.trains:
        suffixes.append(".model")
    with output.exclusive():
        settings["input_sha256"] = corpus.digest()
        manifest = _reusable(output, settings, suffixes, args.overwrite)
        if manifest is not None:
            print(f"{args.output_prefix} is up to date: {_summary(manifest)}")
        else:
            start = time.monotonic()
            manifest = _build(args, corpus, output)
            corpus.check_unchanged()
            output.publish({"settings": settings, **manifest}, suffixes)
            seconds = time.monotonic() - start
            print(f"{args.output_prefix}: {_summary(manifest)}, {seconds:.1f} s")
    print(f"train on it with: {_megatron_flags(args, output, manifest)}")


def _reusable(
    output: OutputFiles, settings: dict[str, Any], suffixes: list[str], overwrite: bool
) -> Manifest | None:
    """The manifest of the very dataset that is asked for; raise if another is in its place."""
    manifest = output.published()
    if manifest is None:
        existing = output.existing(suffixes)
        fault = f"{existing[0]} exists and was not made by this tool" if existing else None
    else:
        known = manifest["settings"]
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if changed:
            fault = f"it was made with another {', '.join(changed)}"
        else:
            fault = output.damage(manifest)
            if fault is None:
                return manifest
    if fault is not None and not overwrite:
        raise DataError(
            f"--output-prefix {output.prefix} is taken: {fault}; "
            "add --overwrite to replace it or choose another prefix"
        )
    return None


def _build(args: Arguments, corpus: Corpus, output: OutputFiles) -> Manifest:
    """Write all files under their temporary names and return what there is to say of them."""
    documents = None
    model = args.tokenizer_model
    if model is None:
        model = output.temporary(".model")
        sample = TrainingSample(TRAINING_CHARACTERS)
        documents = 0
        for text in corpus.documents():
            # The validation part must be new to the tokenizer too.
            if not _is_valid(documents, args.valid_fraction):
                sample.add(text)
            documents += 1
        if not sample.lines:
            raise _no_text(corpus)
        print(f"training a tokenizer on {len(sample.lines):,} lines", file=sys.stderr)
        model.write_bytes(train_sentencepiece(sample.lines, args.vocab_size))
        del sample
    spec = TokenizerSpec(args.tokenizer_type, model, args.append_eod)
    encoder = spec.load()
    writers = {split: _Writer(output, split, encoder.vocab_size) for split in args.splits}
    count = 0
    # `disable=None`: no bar where stderr is no terminal, and so none in log files.
    with tqdm(total=documents, unit="doc", desc="tokenising", disable=None) as bar:
        for characters, ids in encode_documents(corpus.documents(), spec, args.workers):
            is_valid = _is_valid(count, args.valid_fraction)
            writers[args.splits[is_valid]].add(characters, ids)
            count += 1
            bar.update()
            if count % 64 == 0:
                bar.set_postfix_str(_rates(writers, bar.format_dict["elapsed"]), refresh=False)
    for split, writer in writers.items():
        if not count:
            raise _no_text(corpus)
        if not writer.documents:
            raise DataError(
                f"--valid-fraction {float(args.valid_fraction)} of {count} documents leaves "
                f"PREFIX{split} empty; choose one nearer to 0.5, or give more documents"
            )
        writer.finish()
    return {
        "vocab_size": encoder.vocab_size,
        "eod": encoder.eod,
        "skipped": {"empty documents": corpus.empty, "files that are not text": corpus.not_text},
        "splits": {split: writer.counts() for split, writer in writers.items()},
    }


def _is_valid(index: int, fraction: Fraction) -> bool:
    """Spread the validation documents evenly: after n documents, floor(n · fraction) were."""
    return int((index + 1) * fraction) > int(index * fraction)


def _no_text(corpus: Corpus) -> DataError:
    return DataError(
        f"the input holds no text: of {len(corpus.files)} files {corpus.not_text} are not UTF-8, "
        f"and {corpus.empty} documents are empty; name files that hold text with --input"
    )


class _Writer:
    """One .bin and .idx in the making, through megatron-core's own builder."""

    def __init__(self, output: OutputFiles, split: str, vocab_size: int) -> None:
        datasets = _import_indexed_dataset()
        self._index = output.temporary(f"{split}.idx")
        self._builder = datasets.IndexedDatasetBuilder(
            str(output.temporary(f"{split}.bin")),
            dtype=datasets.DType.optimal_dtype(vocab_size),
        )
        self.documents = self.characters = self.tokens = 0

    def add(self, characters: int, ids: Encoded) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.characters += characters
        self.tokens += len(ids)

    def finish(self) -> None:
        self._builder.finalize(str(self._index))

    def counts(self) -> dict[str, int]:
        return {
            "documents": self.documents,
            "characters": self.characters,
            "tokens": self.tokens,
        }


def _import_indexed_dataset() -> Any:
    # Late, for it takes seconds; quietly, for what it warns of (no GPU, no Apex) is no matter here.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        logging.disable(logging.NOTSET)
    return indexed_dataset


def _rates(writers: dict[str, _Writer], elapsed: float) -> str:
    tokens = sum(writer.tokens for writer in writers.values())
    characters = sum(writer.characters for writer in writers.values())
    return f"{characters / 1e6:.1f} M characters, {tokens / max(elapsed, 1e-9):,.0f} tokens/s"


def _summary(manifest: Manifest) -> str:
    splits = manifest["splits"].values()
    documents, characters, tokens = (
        sum(split[key] for split in splits) for key in ("documents", "characters", "tokens")
    )
    left_out = [f"{count:,} {what}" for what, count in manifest["skipped"].items() if count]
    skipped = f" (skipped: {', '.join(left_out)})" if left_out else ""
    return (
        f"{documents:,} documents{skipped}, {tokens:,} tokens, "
        f"{characters / tokens:.2f} characters per token"
    )


def _megatron_flags(args: Arguments, output: OutputFiles, manifest: Manifest) -> str:
    model = args.tokenizer_model or output.path(".model")
    names = {"": "--data-path", "_train": "--train-data-path", "_valid": "--valid-data-path"}
    data = [f"{names[split]} {output.path(split)}" for split in manifest["splits"]]
    return f"{' '.join(data)} --tokenizer-type {args.tokenizer_type} --tokenizer-model {model}"


if __name__ == "__main__":
    sys.exit(main())
