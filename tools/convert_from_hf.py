# SPDX-License-Identifier: Apache-2.0
"""Turn a Hugging Face LLaMA into a Megatron checkpoint, to train on through a slow network.

    python tools/convert_from_hf.py --hf-model Llama-3.2-1B --output runs/llama --seq-length 4096

Writes a checkpoint of --ckpt-format torch_dist, on a CPU, in one process, and prints the flags of
pretrain_gpt.py that load it. It fits any layout. With --mapl-rank and --mapl-checkpoint fresh the
boundaries start anew around the model.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cli import Parser, positive, run
from hf_checkpoint_writer import write_checkpoint
from hf_config import flags, megatron_arguments
from hf_errors import ConversionError
from hf_model import NULL, Weights, read_config, tokenizer_arguments
from hf_output import check_free, new_folder
from hf_weights import EXTRA_STATES, to_megatron

_DTYPES = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"], torch.float32: []}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; faults that the user can mend are one line on stderr and exit code 2."""
    args = _parse(argv)

    def work() -> None:
        words = convert(args)
        print(f"train on from it with pretrain_gpt.py and: {shlex.join(words)}")
        print("and for boundaries, which start anew: --mapl-rank R --mapl-checkpoint fresh")

    return run(
        "convert_from_hf.py",
        work,
        faults=ConversionError,
        output=f"--output {args.output}",
        interrupted="nothing was written",
    )


def convert(args: argparse.Namespace) -> list[str]:
    """Writes the checkpoint.

    Returns:
        The flags that load it.

    Raises:
        ConversionError: it cannot be made.
    """
    check_free(args.output)
    config = read_config(args.hf_model)
    most = int(config.max_position_embeddings)
    if args.seq_length is not None and args.seq_length > most:
        raise ConversionError(
            f"--seq-length {args.seq_length} is more than the model's max_position_embeddings "
            f"{most} (config.json), which Megatron refuses; give at most {most}"
        )
    settings = megatron_arguments(config, args.seq_length or most)
    tokenizer = tokenizer_arguments(args.hf_model, config.vocab_size)
    weights = Weights(args.hf_model)
    with new_folder(args.output) as folder:
        tensors = to_megatron(weights.read, config)
        weights.close(tied=config.tie_word_embeddings)
        dtype = _common_type(args.hf_model, tensors)
        saved = argparse.Namespace(
            **settings,
            **tokenizer,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            ckpt_format="torch_dist",
        )
        write_checkpoint(folder, tensors, saved, EXTRA_STATES)
    if tokenizer["tokenizer_type"] != NULL:
        del settings["vocab_size"]  # the tokenizer says it
    words = flags({**settings, **tokenizer}) + _DTYPES[dtype]
    return [*words, "--load", str(args.output), "--finetune", "--ckpt-format", "torch_dist"]


def _common_type(folder: Path, tensors: Mapping[str, Tensor | list[Tensor]]) -> torch.dtype:
    parts = [value if isinstance(value, list) else [value] for value in tensors.values()]
    kinds = {tensor.dtype for part in parts for tensor in part}
    if len(kinds) > 1 or not kinds <= set(_DTYPES):
        raise ConversionError(
            f"--hf-model {folder} has weights of {', '.join(sorted(map(str, kinds)))}; "
            "Megatron trains models of one type, bf16, fp16 or fp32: save it in one of them"
        )
    (dtype,) = kinds
    return dtype


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("convert_from_hf.py", __doc__)
    parser.add_argument(
        "--hf-model", type=Path, required=True, metavar="DIR", help="folder of a LLaMA"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="Megatron's --seq-length (default: the model's max_position_embeddings)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
