# SPDX-License-Identifier: Apache-2.0
"""Turn a Megatron checkpoint into a LLaMA for transformers.

    python tools/convert_to_hf.py --load runs/mine --output mine-hf
    python tools/convert_to_hf.py --load runs/mine --output mine-plain --export plain \\
        --data data/mine_valid

Reads --ckpt-format torch_dist of any layout, on a CPU, in one process. `exact` is the function
that was trained, boundaries included: it brings its own modelling code (load it with
trust_remote_code=True). `plain` is a LlamaForCausalLM without the boundaries: another function,
with another loss, which --data measures beside the trained one's.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_boundaries import Boundaries, find_boundaries
from hf_checkpoint import ConversionError, MegatronCheckpoint
from hf_config import check_llama, llama_settings
from hf_loss import mean_loss, windows
from hf_output import check_free, new_folder, save_weights
from hf_tokenizer import Tokenizer, find_tokenizer
from hf_weights import EMBEDDING, to_hugging_face

_CODE = Path(__file__).parent / "mapl_llama"
_AUTO_MAP = {
    "AutoConfig": "configuration_mapl_llama.MaplLlamaConfig",
    "AutoModelForCausalLM": "modeling_mapl_llama.MaplLlamaForCausalLM",
}
_RECORD = "mapl_conversion.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; faults that the user can mend are one line on stderr and exit code 2."""
    args = _parse(argv)
    try:
        convert(args)
    except ConversionError as error:
        print(f"convert_to_hf.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or f"--output {args.output}"
        print(f"convert_to_hf.py: error: {where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_to_hf.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def convert(args: argparse.Namespace) -> None:
    """Writes the export.

    Raises:
        ConversionError: it cannot be made.
    """
    check_free(args.output)
    checkpoint = MegatronCheckpoint(args.load)
    check_llama(checkpoint.args)
    boundaries = find_boundaries(checkpoint)
    source = Source(checkpoint, boundaries, find_tokenizer(checkpoint.args, args.tokenizer_model))
    record: dict[str, Any] = {
        "source": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "export": args.export if boundaries else "plain",
        "boundaries_after_layers": [boundaries.cuts[n] for n in boundaries.compressed]
        if boundaries
        else [],
    }
    samples = None
    if args.data is not None:
        length = int(checkpoint.args.seq_length)
        samples = windows(args.data, length, args.data_samples, source.tokenizer.size)
    with new_folder(args.output) as folder:
        exact = boundaries is not None and args.export == "exact"
        source.write(folder, args.max_shard_size, exact=exact)
        if samples is not None:
            record["loss"] = _losses(source, folder, samples, exact=exact)
            record["data"] = {"prefix": str(args.data), "samples": len(samples)}
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(_summary(args, record))


class Source:
    """What all exports of one checkpoint share."""

    def __init__(
        self, checkpoint: MegatronCheckpoint, boundaries: Boundaries | None, tokenizer: Tokenizer
    ) -> None:
        self.checkpoint, self.boundaries, self.tokenizer = checkpoint, boundaries, tokenizer
        if EMBEDDING not in checkpoint.tensors:
            raise ConversionError(f"--load {checkpoint.folder} has no {EMBEDDING}: it is no model")
        padded = checkpoint.shape(EMBEDDING)[0]
        if tokenizer.size > padded:
            raise ConversionError(
                f"the tokenizer has {tokenizer.size} tokens, the model's embedding {padded}; give "
                "the tokenizer that it was trained with (--tokenizer-model)"
            )

    def write(self, folder: Path, max_shard_size: str, *, exact: bool) -> None:
        """Configuration, weights, tokenizer and, if `exact`, modelling code."""
        from transformers import GenerationConfig, LlamaConfig

        from mapl_llama.configuration_mapl_llama import MaplLlamaConfig

        dtype = self.checkpoint.dtype(EMBEDDING)
        size, special = self.tokenizer.size, self.tokenizer.special_ids()
        settings = llama_settings(self.checkpoint.args, size, dtype) | special
        boundaries = self.boundaries
        if exact:
            assert boundaries is not None
            settings |= boundaries.settings()
            settings |= {"architectures": ["MaplLlamaForCausalLM"], "auto_map": _AUTO_MAP}
            config = MaplLlamaConfig(**settings)
        else:
            config = LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
        table = None if boundaries is None else boundaries.embedding_table
        weights = to_hugging_face(self.checkpoint, config, table)
        if exact:
            assert boundaries is not None
            weights |= boundaries.weights(size, dtype)
            for file in sorted(_CODE.glob("*.py")):
                shutil.copyfile(file, folder / file.name)
        save_weights(folder, weights, max_shard_size)
        config.save_pretrained(folder)
        GenerationConfig(**special).save_pretrained(folder)
        self.tokenizer.save(folder)


def _losses(
    source: Source, folder: Path, samples: torch.Tensor, *, exact: bool
) -> dict[str, float]:
    """The loss through the boundaries and without them, of what is in the folder."""
    from transformers import LlamaForCausalLM

    from mapl_llama.modeling_mapl_llama import MaplLlamaForCausalLM

    if source.boundaries is None:
        model = LlamaForCausalLM.from_pretrained(folder)
        return {"plain": mean_loss(_on_device(model), samples, "loss")}
    measured = folder
    if not exact:
        measured = folder / "exact"
        measured.mkdir()
        source.write(measured, "1TB", exact=True)
    try:
        model = _on_device(MaplLlamaForCausalLM.from_pretrained(measured))
        losses = {"trained": mean_loss(model, samples, "loss as trained")}
        for layer in model.model.layers:
            layer.boundary = None
        losses["plain"] = mean_loss(model, samples, "loss without boundaries")
    finally:
        if not exact:
            shutil.rmtree(measured)
    losses["change_percent"] = 100 * (losses["plain"] / losses["trained"] - 1)
    return losses


def _on_device(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model


def _summary(args: argparse.Namespace, record: dict[str, Any]) -> str:
    places = ", ".join(map(str, record["boundaries_after_layers"]))
    lines = [f"{args.output}: {record['export']} export of step {record['iteration']}"]
    if not places:
        lines.append("the model has no boundaries: a plain LLaMA is all of it")
    elif record["export"] == "plain":
        lines.append(
            f"left out: the boundaries after layers {places}. Without them it is another function "
            "than was trained"
        )
    losses = record.get("loss")
    if losses is None and places and record["export"] == "plain":
        lines.append("by how much its loss differs is not known: --data PREFIX measures it")
    elif losses is not None and places:
        lines.append(
            f"loss on {record['data']['samples']} samples of {args.data}: {losses['trained']:.6f} "
            f"as trained, {losses['plain']:.6f} without boundaries "
            f"({losses['change_percent']:+.2f}%)"
        )
    elif losses is not None:
        lines.append(f"loss on {record['data']['samples']} samples: {losses['plain']:.6f}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_to_hf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--load", type=Path, required=True, metavar="DIR", help="Megatron's --save, or an iter_…"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--export", choices=["exact", "plain"], default="exact", help="default: %(default)s"
    )
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="PATH",
        help="where the training's tokenizer is now (default: where it was)",
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", help="of a weight file (default: 5GB)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PREFIX",
        help="a Megatron dataset to measure the loss on, with and without the boundaries",
    )
    parser.add_argument(
        "--data-samples", type=_positive, metavar="N", help="sequences of it (default: all)"
    )
    args = parser.parse_args(argv)
    if args.data_samples is not None and args.data is None:
        parser.error(f"--data-samples {args.data_samples} has no effect without --data")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _size(text: str) -> str:
    number = text.upper().removesuffix("B")[:-1]
    if not (number.isdecimal() and int(number) and text.upper()[len(number) :] in _UNITS):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 5GB or 200MB")
    return text.upper()


_UNITS = ("KB", "MB", "GB", "TB")


if __name__ == "__main__":
    sys.exit(main())
