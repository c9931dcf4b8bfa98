# SPDX-License-Identifier: Apache-2.0
"""Print Megatron's flags, a word a line, for a dataset that prepare_data.py has made.

    python tools/data_flags.py data/corpus --vocab-size 32000 [FLAGS OF THE JOB...]

Checked before a job starts: the dataset is finished, has a validation part, and its tokens are
those of the model's vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tokenizer import SENTENCEPIECE
from training_data import DATA_FLAGS, fill_in

_NO_MODEL = DATA_FLAGS.replace("--tokenizer-model {data}.model ", "")


class DataFlagsError(ValueError):
    """The dataset does not fit; the message names it and the remedy."""


def data_flags(prefix: Path, vocab_size: int, tokenizer_model: str | None) -> list[str]:
    """Megatron's flags for PREFIX_train and PREFIX_valid.

    Args:
        prefix: what prepare_data.py was given as --output-prefix.
        vocab_size: of the model.
        tokenizer_model: the job's own --tokenizer-model, or None for PREFIX.model.

    Raises:
        DataFlagsError: there is no such dataset, or it does not fit the model.
    """
    path = prefix.with_name(prefix.name + ".json")
    prepare = f"python tools/prepare_data.py --output-prefix {prefix} --valid-fraction 0.01"
    try:
        manifest = json.loads(path.read_bytes())
        splits, found = manifest["splits"], manifest["vocab_size"]
        tokenizer = manifest["settings"]["tokenizer_type"]
    except FileNotFoundError:
        raise DataFlagsError(
            f"DATA={prefix}: there is no {path}, so no finished dataset; make one with {prepare} "
            f"--vocab-size {vocab_size} --input FILES"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataFlagsError(
            f"DATA={prefix}: {path} is no manifest of tools/prepare_data.py; make the dataset anew"
        ) from None
    if "_valid" not in splits:
        raise DataFlagsError(
            f"DATA={prefix} has no validation part; make it with {prepare} --overwrite and the "
            "rest as before"
        )
    if found != vocab_size:
        raise DataFlagsError(
            f"DATA={prefix} has a vocabulary of {found} tokens, the model one of {vocab_size}; "
            f"make a dataset with {prepare} --vocab-size {vocab_size}, or add --vocab-size {found}"
        )
    if tokenizer_model is None and not prefix.with_name(prefix.name + ".model").exists():
        raise DataFlagsError(
            f"DATA={prefix} was made with a tokenizer from elsewhere; add --tokenizer-model and "
            "the path that prepare_data.py was given"
        )
    flags = DATA_FLAGS if tokenizer_model is None else _NO_MODEL
    return fill_in(flags.replace(SENTENCEPIECE, tokenizer).split(), prefix)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; what the user can mend is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="data_flags.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prefix", type=Path, metavar="PREFIX")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--tokenizer-model")
    args, _ = parser.parse_known_args(argv)
    try:
        flags = data_flags(args.prefix, args.vocab_size, args.tokenizer_model)
    except DataFlagsError as error:
        print(f"data_flags.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
