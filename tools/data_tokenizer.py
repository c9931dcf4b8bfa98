# SPDX-License-Identifier: Apache-2.0
"""The tokenizers of prepare_data.py: train one, load one, run one in several processes.

The ids are those that Megatron's `--tokenizer-type SentencePieceTokenizer` and
`HuggingFaceTokenizer` give, `eod` included. Megatron's own classes are not used here because
importing them takes each worker process ten seconds.
"""

import io
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_sources import DataError

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGINGFACE = "HuggingFaceTokenizer"

# SentencePiece drops sentences over 4192 bytes; a character takes at most four.
_MAX_SENTENCE = 1000
_BATCH_CHARACTERS = 250_000
_BATCHES_AHEAD = 4

Encoded = npt.NDArray[np.int32]


class Encoder(Protocol):
    """What is asked of a tokenizer; `eod` is None where it has no end-of-document token."""

    vocab_size: int
    eod: int | None

    def encode(self, text: str) -> list[int]: ...


class SentencePieceEncoder:
    """A SentencePiece model file; Megatron takes its </s> as the end of a document."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise DataError(f"--tokenizer-model {path} is no SentencePiece model file") from None
        self.vocab_size = int(self._processor.get_piece_size())
        eos = int(self._processor.eos_id())
        self.eod = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


class HuggingFaceEncoder:
    """A local Hugging Face tokenizer; its special tokens (a BOS, say) are added as it is set to.

    Megatron takes eos_token as the end of a document, or sep_token where there is none.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers raises anything, from KeyError to ImportError
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"--tokenizer-model {path} holds no tokenizer: {reason}") from None
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        token = tokenizer.eos_token or tokenizer.sep_token
        self.eod = None if token is None else int(tokenizer.convert_tokens_to_ids(token))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False).input_ids
        return ids


@dataclass(frozen=True)
class TokenizerSpec:
    """What a worker process needs to build its tokenizer."""

    kind: str
    path: Path
    append_eod: bool

    def load(self) -> Encoder:
        """Load the tokenizer, and refuse one that cannot end a document."""
        encoder: Encoder
        if self.kind == HUGGINGFACE:
            encoder = HuggingFaceEncoder(self.path)
        else:
            encoder = SentencePieceEncoder(self.path)
        if self.append_eod and encoder.eod is None:
            raise DataError(
                f"--tokenizer-model {self.path} has no end-of-sequence token to end documents "
                "with; take another tokenizer or add --no-append-eod"
            )
        return encoder


class TrainingSample:
    """At most `limit` characters of the lines it is given, spread evenly over all of them.

    Every stride-th line is kept. When they grow over the limit, every second one of them is
    dropped and the stride doubles, so one pass in bounded memory is enough and nothing is random.
    """

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = []
        self._limit = limit
        self._size = 0
        self._stride = 1
        self._seen = 0

    def add(self, text: str) -> None:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_SENTENCE):
                if self._seen % self._stride == 0:
                    self.lines.append(line[start : start + _MAX_SENTENCE])
                    self._size += len(self.lines[-1])
                self._seen += 1
        while self._size > self._limit and len(self.lines) > 1:
            self.lines = self.lines[::2]
            self._size = sum(map(len, self.lines))
            self._stride *= 2


def train_sentencepiece(lines: list[str], vocab_size: int) -> bytes:
    """Train a BPE model that gives every text back as it was, white space included.

    One exception is SentencePiece's own: U+2581 stands for a space and comes back as one.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # The number is written into the model, so it may not follow the machine.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is more than the text can fill; "
            f"give at most {found[1]}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small for the characters of the text; "
            f"give at least {found[1]}"
        )
    return f"--vocab-size {vocab_size}: SentencePiece could not train a model: {message}"


def encode_documents(
    documents: Iterable[str], spec: TokenizerSpec, workers: int
) -> Iterator[tuple[int, Encoded]]:
    """Yield (characters, ids) of every document, in order, whatever the number of workers."""
    batches = _batched(documents)
    if workers == 1:
        encoder = spec.load()
        for batch in batches:
            yield from _encode_batch(batch, encoder, spec.append_eod)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, initargs=(spec,)
    )
    pending: deque[Future[list[tuple[int, Encoded]]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= workers * _BATCHES_AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"--workers {workers}: a worker process died, for want of memory perhaps; lower it"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(
    batch: list[str], encoder: Encoder, append_eod: bool
) -> list[tuple[int, Encoded]]:
    encoded = []
    for text in batch:
        ids = encoder.encode(text)
        # Some Hugging Face tokenizers end a text with their EOS already.
        if append_eod and encoder.eod is not None and ids[-1:] != [encoder.eod]:
            ids.append(encoder.eod)
        encoded.append((len(text), np.array(ids, dtype=np.int32)))
    return encoded


_worker: tuple[Encoder, bool] | None = None


def _start_worker(spec: TokenizerSpec) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = spec.load(), spec.append_eod


def _exit_with_parent() -> None:
    # A worker holds both ends of its queues, so nothing else tells it that the parent was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(batch: list[str]) -> list[tuple[int, Encoded]]:
    assert _worker is not None
    return _encode_batch(batch, *_worker)
