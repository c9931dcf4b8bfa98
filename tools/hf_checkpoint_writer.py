# SPDX-License-Identifier: Apache-2.0
"""Writes what Megatron loads as a converted ("release") checkpoint of --ckpt-format torch_dist."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from hf_checkpoint import COMMON_KEY, FORMAT_FILE, TRACKER


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor | list[Tensor]],
    args: argparse.Namespace,
    layers: Sequence[str],
) -> None:
    """Writes the checkpoint, at iteration 0.

    Args:
        folder: that is to hold it, empty.
        tensors: key → tensor, or a list of one for each layer, which are stacked along a new
            dimension 0 and stored one by one, as Megatron does.
        args: Megatron's arguments that tell the model's shape.
        layers: keys of modules that have an (empty) extra state, which Megatron asks for.
    """
    release, count = folder / "release", args.num_layers
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    # Megatron keeps each object as a list of one.
    state: dict[str, Any] = {COMMON_KEY: [common]}
    stacks: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        if isinstance(value, list):
            stacks[key] = value
        else:
            state[key] = value
    for key in layers:
        for layer in range(count):
            state[f"{key}._extra_state/shard_{layer}_{count}"] = [None]
    save(state, storage_writer=FileSystemWriter(release), planner=_Planner(stacks), no_dist=True)
    (release / FORMAT_FILE).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / TRACKER).write_text("release")


class _Planner(DefaultSavePlanner):
    """Adds stacks, each layer of which is one chunk [1, …], so that it can be read by itself."""

    def __init__(self, stacks: Mapping[str, list[Tensor]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._stacks = stacks

    def create_local_plan(self) -> SavePlan:
        """The plan of all that is written."""
        plan = super().create_local_plan()
        items = [
            _chunk(key, layer, len(stack), tensor)
            for key, stack in self._stacks.items()
            for layer, tensor in enumerate(stack)
        ]
        self.plan = replace(plan, items=[*plan.items, *items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What is to be written for this entry of the plan."""
        if index.fqn not in self._stacks:
            return super().lookup_object(index)
        assert index.offset is not None
        return self._stacks[index.fqn][index.offset[0]][None]


def _chunk(key: str, layer: int, count: int, tensor: Tensor) -> WriteItem:
    offsets = torch.Size([layer, *[0] * tensor.dim()])
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size([1, *tensor.shape])),
            properties=TensorProperties.create_from_tensor(tensor),
            size=torch.Size([count, *tensor.shape]),
        ),
    )
