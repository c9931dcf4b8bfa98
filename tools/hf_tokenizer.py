# SPDX-License-Identifier: Apache-2.0
"""Megatron's tokenizers as Hugging Face's."""

import argparse
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tokenizer import HUGGINGFACE, SENTENCEPIECE
from hf_errors import ConversionError

_TOKENIZER_FLAG, _SPECIAL_FLAG = "--tokenizer-model", "--tokenizer-special-tokens"

#: What is tried on both tokenizers, beside each piece of the vocabulary.
_SAMPLES = (
    "",
    " ",
    "  two  spaces ",
    "def f(x):\n\treturn x + 1234567\n\n",
    "Grüße, 世界 — 🙂!",
)


@dataclass(frozen=True)
class Tokenizer:
    """What a conversion needs of it.

    Attributes:
        size: tokens, without padding.
        hugging_face: the tokenizer, or None where there is none (NullTokenizer).
        model: the SentencePiece file that it was made from, if it was.
        eos: the id that ends a document.
    """

    size: int
    hugging_face: Any = None
    model: Path | None = None
    eos: int | None = None

    def special_ids(self) -> dict[str, int | None]:
        """The fields of a configuration."""
        known = self.hugging_face
        return {
            "bos_token_id": None if known is None else known.bos_token_id,
            "eos_token_id": self.eos if known is None else known.eos_token_id,
            "pad_token_id": None if known is None else known.pad_token_id,
        }

    def save(self, folder: Path) -> None:
        """Writes its files."""
        if self.hugging_face is not None:
            self.hugging_face.save_pretrained(folder)
        if self.model is not None:
            shutil.copyfile(self.model, folder / "tokenizer.model")


def find_tokenizer(args: argparse.Namespace, override: Path | None) -> Tokenizer:
    """The tokenizer that the model was trained with.

    Args:
        args: Megatron's.
        override: where it is now, if not where it was.

    Raises:
        ConversionError: it is not there, or of a kind that is not converted.
    """
    kind, given = args.tokenizer_type, getattr(args, "tokenizer_model", None)
    if kind == "NullTokenizer":
        if override is not None:
            raise ConversionError(
                f"{_TOKENIZER_FLAG} {override} has no effect: the model was trained with "
                "--tokenizer-type NullTokenizer; leave it out"
            )
        eos = getattr(args, "null_tokenizer_eod_id", None)
        size = int(args.vocab_size)
        return Tokenizer(size, eos=size - 1 if eos is None else int(eos))
    path = override or (None if given is None else Path(given))
    if kind not in (SENTENCEPIECE, HUGGINGFACE):
        raise ConversionError(
            f"the model was trained with --tokenizer-type {kind}, which is not converted; only "
            f"{SENTENCEPIECE}, {HUGGINGFACE} and NullTokenizer are"
        )
    if path is None or not path.exists():
        raise ConversionError(
            f"the tokenizer of the training run, {path}, is not on this machine; say where it is "
            f"with {_TOKENIZER_FLAG}"
        )
    added = getattr(args, "special_tokens", None) or []
    if kind == SENTENCEPIECE:
        if added:
            raise ConversionError(
                f"the model was trained with {_SPECIAL_FLAG} {' '.join(added)}, which are not in "
                f"{path}: a SentencePieceTokenizer with more tokens than its file is not converted"
            )
        return _from_sentencepiece(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises anything, from KeyError to ImportError
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(f"{_TOKENIZER_FLAG} {path} holds no tokenizer: {reason}") from None
    missing = [token for token in added if token not in tokenizer.get_vocab()]
    if missing:
        raise ConversionError(
            f"the model was trained with {_SPECIAL_FLAG} {' '.join(added)}, and {path} does not "
            f"know {' '.join(missing)}; add them to a copy of it with add_special_tokens and "
            f"save_pretrained, and name that with {_TOKENIZER_FLAG}"
        )
    if getattr(args, "tokenizer_hf_no_include_special_tokens", False) and tokenizer("").input_ids:
        raise ConversionError(
            f"the model was trained with --tokenizer-hf-no-include-special-tokens, but {path} puts "
            f"{' '.join(tokenizer.convert_ids_to_tokens(tokenizer('').input_ids))} around texts; "
            f"save a copy of it that does not, and name that with {_TOKENIZER_FLAG}"
        )
    return Tokenizer(len(tokenizer), tokenizer)


def _from_sentencepiece(path: Path) -> Tokenizer:
    """A `LlamaTokenizer` of a SentencePiece BPE model, tried against it.

    Raises:
        ConversionError: the file is no such model, or gives other ids than its conversion.
    """
    import sentencepiece
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise ConversionError(f"{_TOKENIZER_FLAG} {path} is no SentencePiece model file") from None
    extractor = SentencePieceExtractor(str(path))
    spec, normalizer = extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    if spec.model_type != spec.BPE:
        raise ConversionError(
            f"{_TOKENIZER_FLAG} {path} is no BPE model, and LLaMA's tokenizers are; convert it to "
            f"a Hugging Face tokenizer by itself and give its folder with --tokenizer-type "
            f"{HUGGINGFACE} in training"
        )
    extracted = extractor.extract(None)
    pieces = {name: _piece(original, getattr(original, f"{name}_id")()) for name in _SPECIAL}
    tokenizer = LlamaTokenizer(
        vocab=extracted["vocab"],
        merges=extracted["merges"],
        add_prefix_space=normalizer.add_dummy_prefix,
        add_bos_token=False,  # Megatron puts none before a text
        add_eos_token=False,
        **{f"{name}_token": piece for name, piece in pieces.items()},
    )
    special = {piece for piece in pieces.values() if piece is not None}
    symbols = [token for token in extracted["additional_special_tokens"] if not token.special]
    tokenizer.add_tokens([token for token in symbols if token.content not in special])
    if normalizer.add_dummy_prefix:
        tokenizer = _with_prefix(tokenizer)
    _compare(path, original, tokenizer)
    return Tokenizer(original.get_piece_size(), tokenizer, path)


def _with_prefix(tokenizer: Any) -> Any:
    """The same with a space before every text, as SentencePiece puts it.

    `LlamaTokenizer` leaves it out where a text begins with one.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizer.backend_tokenizer
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer, inner.pre_tokenizer = normalizers.Sequence(steps), None
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in _SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


_SPECIAL = ("unk", "bos", "eos", "pad")


def _piece(model: Any, index: int) -> str | None:
    return str(model.id_to_piece(index)) if index >= 0 else None


def _compare(path: Path, original: Any, converted: Any) -> None:
    """Both must give the same ids, for each piece and for what is hard.

    Raises:
        ConversionError: they do not.
    """
    ordinary = [
        original.id_to_piece(i).replace("▁", " ")
        for i in range(original.get_piece_size())
        if not (original.is_control(i) or original.is_byte(i) or original.is_unknown(i))
    ]
    together = " ".join(ordinary)
    for text in (*_SAMPLES, *ordinary, together, unicodedata.normalize("NFD", _SAMPLES[4])):
        ours = converted(text, add_special_tokens=False).input_ids
        if ours != original.encode(text):
            raise ConversionError(
                f"{_TOKENIZER_FLAG} {path}: as a Hugging Face tokenizer it would give other ids "
                f"for {text[:40]!r}; convert it by yourself, and train with --tokenizer-type "
                f"{HUGGINGFACE}"
            )
