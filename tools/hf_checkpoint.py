# SPDX-License-Identifier: Apache-2.0
"""Megatron's `torch_dist` checkpoints, read by one process on a CPU.

The format is that of `torch.distributed.checkpoint`, so neither Megatron nor process groups are
needed. Tensors are global: how many ranks wrote them, and in which layout, does not show. What is
no tensor (Megatron's arguments, the list of tensors) is pickled, and read by `hf_unpickling`.
"""

import argparse
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import hf_unpickling
from hf_errors import ConversionError, read_json

#: Megatron's key, in older and in newer versions, of what is no tensor.
_COMMON_FILE, COMMON_KEY = "common.pt", "common_state/shard_0_1"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_FILE = "metadata.json"
_METADATA_FILE = ".metadata"


class _Reader(FileSystemReader):
    """PyTorch's reader, which would unpickle anything, over pickles that call what is known."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / _METADATA_FILE
        with file.open("rb") as stream:
            found = hf_unpickling.load_pickle(file, stream)
        if not isinstance(found, Metadata) or not found.storage_data:
            raise ConversionError(f"{file} is no list of tensors; save the checkpoint again")
        return found


class MegatronCheckpoint:
    """One saved iteration.

    Args:
        directory: what was Megatron's `--save`, or the folder of one iteration in it.

    Attributes:
        folder: that of the iteration.
        tensors: key → what the checkpoint says of a tensor.
        args: Megatron's arguments in the run that saved it.
        iteration: steps that were trained.

    Raises:
        ConversionError: there is no checkpoint, or it has another format.
    """

    def __init__(self, directory: Path) -> None:
        self.folder = _iteration_folder(directory)
        self._reader = _Reader(self.folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = entry
            else:
                self._objects[key] = entry
        common = self._common()
        self.args: argparse.Namespace = common["args"]
        self.iteration = int(common.get("iteration") or 0)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's global shape."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """The tensor's type."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer of those that Megatron stacks along dimension 0.

        Raises:
            ConversionError: part of it is missing in the checkpoint.
        """
        entry = self.tensors[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        out = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(math.prod(item.lengths) for item in items) != out.numel():
            raise ConversionError(f"{self.folder}: parts of {key} are missing; save it again")
        self._reader.read_data(LoadPlan(items), _IntoTensor(out)).wait()
        return out if layer is None else out[0]

    def _common(self) -> dict[str, Any]:
        file = self.folder / _COMMON_FILE
        common: Any = {}
        if file.is_file():
            with file.open("rb") as stream:
                common = hf_unpickling.load_torch(file, stream)
        elif COMMON_KEY in self._objects:
            (item,) = [
                info for index, info in self._reader.storage_data.items() if index.fqn == COMMON_KEY
            ]
            file = self.folder / item.relative_path
            with file.open("rb") as stream:
                stream.seek(item.offset)
                common = hf_unpickling.load_torch(file, io.BytesIO(stream.read(item.length)))
        if isinstance(common, list):
            common = common[0]
        if not isinstance(common, dict) or "args" not in common:
            raise ConversionError(
                f"--load {self.folder}: the arguments of its run are not in it, so its shape is "
                "unknown; give a checkpoint that Megatron's training saved"
            )
        found: dict[str, Any] = common
        return found


class _IntoTensor(LoadPlanner):
    """Puts all that is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        self._out = out

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: Any) -> Any:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the tensor that this item fills."""
        part = self._out
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was filled in place."""


def _iteration_folder(directory: Path) -> Path:
    folder, tracker = directory, directory / TRACKER
    if tracker.is_file():
        step = tracker.read_text().strip()
        if step != "release" and not step.isdecimal():
            raise ConversionError(
                f"{tracker} says {step[:40]!r}, which is no step; give a folder iter_… with --load"
            )
        folder = directory / (step if step == "release" else f"iter_{int(step):07d}")
    file = folder / FORMAT_FILE
    if not file.is_file():
        raise ConversionError(
            f"--load {directory}: there is no {FORMAT_FILE} in {folder}, so it is no checkpoint "
            "of --ckpt-format torch_dist; give what was --save, or a folder iter_… in it"
        )
    kind = read_json(file).get("sharded_backend")
    if kind != "torch_dist":
        raise ConversionError(
            f"--load {directory} has the format {kind}; only --ckpt-format torch_dist is read"
        )
    return folder
