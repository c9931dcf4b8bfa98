# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags for a dataset that prepare_data.py has made with a validation part."""

import hashlib
from pathlib import Path

#: Of a dataset with PREFIX_train and PREFIX_valid; {data} is its prefix, {cache} is `cache_path`.
DATA_FLAGS = (
    "--train-data-path {data}_train --valid-data-path {data}_valid "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model {data}.model "
    "--data-cache-path {cache}"
)


def cache_path(prefix: Path) -> Path:
    """Where Megatron keeps its index of the dataset: another place for another dataset.

    Megatron's own cache of an older dataset of that name would be taken for this one's.

    Raises:
        FileNotFoundError: there is no PREFIX.json, and so no dataset.
    """
    manifest = prefix.with_name(prefix.name + ".json").read_bytes()
    return prefix.with_name("cache-" + hashlib.sha256(manifest).hexdigest()[:12])


def fill_in(flags: list[str], prefix: Path) -> list[str]:
    """Flags in which {data} and {cache} stand for the dataset's places.

    Raises:
        FileNotFoundError: there is no PREFIX.json, and so no dataset.
    """
    places = {"{data}": str(prefix), "{cache}": str(cache_path(prefix))}
    filled = []
    for flag in flags:
        for name, place in places.items():
            flag = flag.replace(name, place)
        filled.append(flag)
    return filled
