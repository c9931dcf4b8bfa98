# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all, and sharded safetensors in it."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hf_errors import ConversionError


class Weight(NamedTuple):
    """A tensor that is read when it is written, so that one shard at a time is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name when the block ends without fault.

    Raises:
        ConversionError: `path` is a file, or a folder that holds something.
    """
    check_free(path)
    path = path.resolve()  # what a symbolic link means is to be replaced, and not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        check_free(path)
        _open_to_others(temporary)
        os.replace(temporary, path)  # over an empty folder, if there is one
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _open_to_others(folder: Path) -> None:
    """Temporary folders and safetensors' files are their owner's alone; these get usual rights."""
    os.umask(mask := os.umask(0))
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def check_free(path: Path) -> None:
    """Refuses an output that would replace something, or that cannot be replaced."""
    if path.resolve() == Path.cwd() or path.is_mount():
        raise ConversionError(
            f"--output {path} is the working directory or a mounted one, which cannot be put in "
            "place as a whole; name a folder in it"
        )
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise ConversionError(
            f"--output {path} exists and is not empty; choose another folder, or remove it"
        )


def save_weights(folder: Path, weights: dict[str, Weight], max_shard_size: str) -> None:
    """Writes model.safetensors, or its shards and their index, with a progress bar.

    Args:
        folder: where.
        weights: name → what is to be written under it.
        max_shard_size: bytes of a shard at most, such as 5GB.
    """
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    # `disable=None`: no bar where stderr is no terminal, and so none in log files.
    with tqdm(total=len(weights), unit="tensor", desc="converting", disable=None) as bar:
        for name, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                tensor = weights[key].load().to(weights[key].dtype)
                if tuple(tensor.shape) != weights[key].shape:
                    raise ConversionError(
                        f"{key} has shape {list(tensor.shape)}, its settings ask for "
                        f"{list(weights[key].shape)}"
                    )
                shard[key] = tensor.clone(memory_format=torch.contiguous_format)
                bar.update()
            save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
