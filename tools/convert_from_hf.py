# SPDX-License-Identifier: Apache-2.0
"""Turn a Hugging Face LLaMA into a Megatron checkpoint, to train on through a slow network.

    python tools/convert_from_hf.py --hf-model Llama-3.2-1B --output runs/llama --seq-length 4096

Writes a checkpoint of --ckpt-format torch_dist, on a CPU, in one process, and prints the flags of
pretrain_gpt.py that load it. It fits any layout. With --mapl-rank and --mapl-checkpoint fresh the
boundaries start anew around the model.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data_tokenizer import HUGGINGFACE, SENTENCEPIECE
from hf_checkpoint import ConversionError, write_checkpoint
from hf_config import flags, megatron_arguments
from hf_output import check_free, new_folder
from hf_weights import EXTRA_STATES, to_megatron

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_NULL = "NullTokenizer"
_DTYPES = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"], torch.float32: []}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; faults that the user can mend are one line on stderr and exit code 2."""
    args = _parse(argv)
    try:
        words = convert(args)
    except ConversionError as error:
        print(f"convert_from_hf.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or f"--output {args.output}"
        print(f"convert_from_hf.py: error: {where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_from_hf.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"train on from it with pretrain_gpt.py and: {shlex.join(words)}")
    print("and for boundaries, which start anew: --mapl-rank R --mapl-checkpoint fresh")
    return 0


def convert(args: argparse.Namespace) -> list[str]:
    """Writes the checkpoint.

    Returns:
        The flags that load it.

    Raises:
        ConversionError: it cannot be made.
    """
    check_free(args.output)
    config = _config(args.hf_model)
    length = args.seq_length or int(config.max_position_embeddings)
    settings = megatron_arguments(config, length)
    weights = Weights(args.hf_model)
    tensors = to_megatron(weights.read, config)
    weights.close(tied=config.tie_word_embeddings)
    kinds = {tensor.dtype for tensor in tensors.values()}
    if len(kinds) > 1 or not kinds <= set(_DTYPES):
        raise ConversionError(
            f"--hf-model {args.hf_model} has weights of {', '.join(sorted(map(str, kinds)))}; "
            "Megatron trains models of one type, bf16, fp16 or fp32: save it in one of them"
        )
    (dtype,) = kinds
    tokenizer = _tokenizer(args.hf_model)
    saved = argparse.Namespace(
        **settings,
        **tokenizer,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        ckpt_format="torch_dist",
    )
    with new_folder(args.output) as folder:
        write_checkpoint(folder, tensors, saved, EXTRA_STATES)
    if tokenizer["tokenizer_type"] != _NULL:
        del settings["vocab_size"]  # the tokenizer says it
    words = flags({**settings, **tokenizer}) + _DTYPES[dtype]
    return [*words, "--load", str(args.output), "--finetune", "--ckpt-format", "torch_dist"]


class Weights:
    """A model's safetensors, sharded or not.

    Raises:
        ConversionError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if (folder / _INDEX).is_file():
            files: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        elif (folder / _SINGLE).is_file():
            with self._opened(_SINGLE) as file:
                files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise ConversionError(
                f"--hf-model {folder} has neither {_SINGLE} nor {_INDEX}; weights in other formats "
                "are not read: save it with save_pretrained of a recent transformers"
            )
        self._files = files
        self._unread = set(files)
        self._bar = tqdm(total=len(files), unit="tensor", desc="reading", disable=None)

    def read(self, name: str) -> Tensor:
        """The weight of this name."""
        if name not in self._files:
            raise ConversionError(f"--hf-model {self._folder} has no {name}, which LLaMAs have")
        with self._opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
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


def _config(folder: Path) -> Any:
    from transformers import LlamaConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(
            f"--hf-model {folder} has no config.json; give the folder of a downloaded model"
        )
    kind = json.loads(file.read_text()).get("model_type")
    if kind == "mapl_llama":
        raise ConversionError(
            f"--hf-model {folder} is an exact export, whose boundaries would start anew; go on "
            "from the Megatron checkpoint that it was made of, or give a plain export"
        )
    if kind != "llama":
        raise ConversionError(f"--hf-model {folder} is a {kind}, and only a llama is converted")
    return LlamaConfig.from_pretrained(folder)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Megatron's arguments for the tokenizer that comes with the model."""
    place = folder.resolve()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return {"tokenizer_type": HUGGINGFACE, "tokenizer_model": str(place)}
    if (folder / "tokenizer.model").is_file():
        return {"tokenizer_type": SENTENCEPIECE, "tokenizer_model": str(place / "tokenizer.model")}
    return {"tokenizer_type": _NULL}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_from_hf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--hf-model", type=Path, required=True, metavar="DIR", help="folder of a LLaMA"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--seq-length",
        type=_positive,
        metavar="N",
        help="Megatron's --seq-length (default: the model's max_position_embeddings)",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
