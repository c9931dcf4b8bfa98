# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face LLaMA on disk: configuration, weights and tokenizer, checked before any work."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data_tokenizer import HUGGINGFACE, SENTENCEPIECE
from hf_errors import ConversionError, first_line, read_json

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NULL = "NullTokenizer"


class Weights:
    """A model's safetensors, sharded or not.

    Raises:
        ConversionError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if (folder / _INDEX).is_file():
            files = read_json(folder / _INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in files.values()
            ):
                raise ConversionError(
                    f"{folder / _INDEX} has no weight_map from names to files beside it; is it "
                    "whole?"
                )
        elif (folder / _SINGLE).is_file():
            with self._opened(_SINGLE) as file:
                files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise ConversionError(
                f"--hf-model {folder} has neither {_SINGLE} nor {_INDEX}; weights in other formats "
                "are not read: save it with save_pretrained of a recent transformers"
            )
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise ConversionError(
                    f"{folder / _INDEX} names {name}, which is not there; fetch the whole model"
                )
        self._files: dict[str, str] = files
        self._unread = set(files)
        self._bar = tqdm(total=len(files), unit="tensor", desc="reading", disable=None)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The weight of this name, which is to have this shape."""
        if name not in self._files:
            raise ConversionError(f"--hf-model {self._folder} has no {name}, which LLaMAs have")
        file = self._files[name]
        with self._opened(file) as opened:
            try:
                tensor: Tensor = opened.get_tensor(name)
            except SafetensorError as error:
                raise ConversionError(f"{self._folder / file} has no {name}: {error}") from None
        if tuple(tensor.shape) != shape:
            raise ConversionError(
                f"{self._folder / file}: {name} has shape {list(tensor.shape)}, and {_CONFIG} asks "
                f"for {list(shape)}; give the {_CONFIG} of this model"
            )
        self._unread.discard(name)
        self._bar.update()
        return tensor

    def close(self, *, tied: bool) -> None:
        """To be called when all has been read.

        Args:
            tied: whether an output layer may stand there that is the embedding again.

        Raises:
            ConversionError: something was not read.
        """
        self._bar.close()
        others = {name for name in self._unread if not name.endswith("rotary_emb.inv_freq")}
        if others - ({"lm_head.weight"} if tied else set()):
            raise ConversionError(
                f"--hf-model {self._folder} holds {', '.join(sorted(others)[:3])}, for which "
                "Megatron's LLaMA has no place"
            )

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self._folder / name, framework="pt")
        except SafetensorError as error:
            raise ConversionError(f"{self._folder / name} cannot be read: {error}") from None


def read_config(folder: Path) -> Any:
    """Its `LlamaConfig`.

    Raises:
        ConversionError: there is none, or of another model.
    """
    from transformers import LlamaConfig

    file = folder / _CONFIG
    if not file.is_file():
        raise ConversionError(
            f"--hf-model {folder} has no {_CONFIG}; give the folder of a downloaded model"
        )
    kind = read_json(file).get("model_type")
    if kind == "mapl_llama":
        raise ConversionError(
            f"--hf-model {folder} is an exact export, whose boundaries would start anew; go on "
            "from the Megatron checkpoint that it was made of, or give a plain export"
        )
    if kind != "llama":
        raise ConversionError(f"--hf-model {folder} is a {kind}, and only a llama is converted")
    try:
        return LlamaConfig.from_pretrained(folder)
    except Exception as error:  # transformers and huggingface_hub have no common class
        raise ConversionError(f"{file} is no LLaMA's: {first_line(error)}") from None


def tokenizer_arguments(folder: Path, rows: int) -> dict[str, Any]:
    """Megatron's arguments for the tokenizer that comes with the model.

    Args:
        folder: of the model.
        rows: of its embedding. Megatron makes its own by the tokenizer, so if that has fewer tokens
            the arguments say how many rows there are; else Megatron would drop the last ones.

    Raises:
        ConversionError: the tokenizer is broken, or has more tokens than the embedding.
    """
    place, size = folder.resolve(), rows
    found: dict[str, Any] = {"tokenizer_type": NULL}
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        found = {"tokenizer_type": HUGGINGFACE, "tokenizer_model": str(place)}
        size = len(_hugging_face(folder))
    elif (folder / "tokenizer.model").is_file():
        file = place / "tokenizer.model"
        found = {"tokenizer_type": SENTENCEPIECE, "tokenizer_model": str(file)}
        size = _pieces(file)
    if size > rows:
        raise ConversionError(
            f"the tokenizer in --hf-model {folder} has {size} tokens, and the embedding {rows} "
            f"rows (vocab_size in {_CONFIG}); give the tokenizer that the model was trained with, "
            "or resize_token_embeddings in transformers first"
        )
    if size < rows:
        found["padded_vocab_size"] = rows
    return found


def _hugging_face(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises anything, from KeyError to ImportError
        raise ConversionError(
            f"the tokenizer in --hf-model {folder} cannot be read: {first_line(error)}; fetch its "
            "files again, or remove them to go on without"
        ) from None


def _pieces(file: Path) -> int:
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (OSError, RuntimeError):
        raise ConversionError(f"{file} is no SentencePiece model file; fetch it again") from None
