# SPDX-License-Identifier: Apache-2.0
"""Megatron's `torch_dist` checkpoints, read and written by one process on a CPU.

The format is that of `torch.distributed.checkpoint`, so neither Megatron nor process groups are
needed. Tensors are global: how many ranks wrote them, and in which layout, does not show. What is
no tensor (Megatron's arguments) is pickled; classes of Megatron in it are replaced by stand-ins,
and nothing but the few classes named here is called.
"""

import argparse
import io
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

#: Megatron's key, in older and in newer versions, of what is no tensor.
_COMMON_FILE, _COMMON_KEY = "common.pt", "common_state/shard_0_1"
_TRACKER = "latest_checkpointed_iteration.txt"
_FORMAT_FILE = "metadata.json"

#: What pickled arguments may hold beside stand-ins.
_KNOWN_CLASSES = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
}


class ConversionError(Exception):
    """A fault that the user can mend; one line."""


class StandIn:
    """In place of an object whose class is not loaded; keeps what it was built from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN_CLASSES:
            return _KNOWN_CLASSES[module, name]
        if module.partition(".")[0] in ("torch", "collections"):
            value = super().find_class(module, name)
            if isinstance(value, torch.dtype) or module in ("torch._utils", "collections"):
                return value
            if isinstance(value, type) and name.endswith("Storage"):
                return value
        return type(name, (StandIn,), {})


_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__=__name__)


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
        self._reader = FileSystemReader(self.folder)
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
        if file.is_file():
            common = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
        elif _COMMON_KEY in self._objects:
            (item,) = [
                info
                for index, info in self._reader.storage_data.items()
                if index.fqn == _COMMON_KEY
            ]
            with (self.folder / item.relative_path).open("rb") as stream:
                stream.seek(item.offset)
                data = io.BytesIO(stream.read(item.length))
            common = torch.load(data, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
        else:
            common = {}
        if isinstance(common, list):
            common = common[0]
        if "args" not in common:
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
    folder, tracker = directory, directory / _TRACKER
    if tracker.is_file():
        step = tracker.read_text().strip()
        folder = directory / (step if step == "release" else f"iter_{int(step):07d}")
    file = folder / _FORMAT_FILE
    if not file.is_file():
        raise ConversionError(
            f"--load {directory}: there is no {_FORMAT_FILE} in {folder}, so it is no checkpoint "
            "of --ckpt-format torch_dist; give what was --save, or a folder iter_… in it"
        )
    kind = json.loads(file.read_text()).get("sharded_backend")
    if kind != "torch_dist":
        raise ConversionError(
            f"--load {directory} has the format {kind}; only --ckpt-format torch_dist is read"
        )
    return folder


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], args: argparse.Namespace, layers: Sequence[str]
) -> None:
    """Writes what Megatron loads as a converted ("release") checkpoint, at iteration 0.

    Args:
        folder: that is to hold it, empty.
        tensors: key → tensor, stacked over the layers.
        args: Megatron's arguments that tell the model's shape.
        layers: keys of modules that have an (empty) extra state, which Megatron asks for.
    """
    release, count = folder / "release", args.num_layers
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    # Megatron keeps each object as a list of one.
    state: dict[str, Any] = {**tensors, _COMMON_KEY: [common]}
    for key in layers:
        for layer in range(count):
            state[f"{key}._extra_state/shard_{layer}_{count}"] = [None]
    save(
        state,
        storage_writer=FileSystemWriter(release),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    (release / _FORMAT_FILE).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / _TRACKER).write_text("release")
