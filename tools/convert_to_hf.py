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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import Parser, positive, run
from hf_boundaries import Boundaries, find_boundaries
from hf_check import check_llama, rounding_notes, sample_notes
from hf_checkpoint import MegatronCheckpoint
from hf_errors import ConversionError
from hf_export import Source, measure
from hf_loss import Windows
from hf_output import check_free, new_folder
from hf_tokenizer import find_tokenizer

_RECORD = "mapl_conversion.json"
_UNITS = ("KB", "MB", "GB", "TB")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; faults that the user can mend are one line on stderr and exit code 2."""
    args = _parse(argv)
    return run(
        "convert_to_hf.py",
        lambda: convert(args),
        faults=ConversionError,
        output=f"--output {args.output}",
        interrupted="nothing was written",
    )


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
    exact = boundaries is not None and args.export == "exact"
    record = _record(args, checkpoint, boundaries)
    samples = None
    if args.data is not None:
        length = int(checkpoint.args.seq_length)
        samples = Windows(args.data, length, args.data_samples, source.tokenizer.size)
        record["notes"] += sample_notes(checkpoint.args)
    with new_folder(args.output) as folder:
        source.write(folder, args.max_shard_size, exact=exact)
        if samples is not None:
            record["loss"] = measure(source, folder, samples, args.max_shard_size, exact=exact)
            record["data"] = {"prefix": str(args.data), "samples": len(samples)}
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(_summary(args, record))


def _record(
    args: argparse.Namespace, checkpoint: MegatronCheckpoint, boundaries: Boundaries | None
) -> dict[str, Any]:
    places = [boundaries.cuts[n] for n in boundaries.compressed] if boundaries else []
    return {
        "source": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "export": args.export if boundaries else "plain",
        "boundaries_after_layers": places,
        "notes": rounding_notes(checkpoint.args),
    }


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
    return "\n".join(lines + [f"note: {note}" for note in record["notes"]])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("convert_to_hf.py", __doc__)
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
        "--data-samples",
        type=positive,
        metavar="N",
        help="windows of --seq-length tokens of it, from its start (default: all)",
    )
    args = parser.parse_args(argv)
    if args.data_samples is not None and args.data is None:
        parser.error(f"--data-samples {args.data_samples} has no effect without --data")
    return args


def _size(text: str) -> str:
    number = text.upper().removesuffix("B")[:-1]
    if not (number.isdecimal() and int(number) and text.upper()[len(number) :] in _UNITS):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 5GB or 200MB")
    return text.upper()


if __name__ == "__main__":
    sys.exit(main())
