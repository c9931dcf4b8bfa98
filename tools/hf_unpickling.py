# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles in a checkpoint without running what they ask for.

A pickle names functions and classes, and loading it calls them. Only those that are listed here are
looked up; any other name becomes a stand-in that does nothing.
"""

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from hf_errors import ConversionError, first_line

#: Where PyTorch's pickles say that each is → what it is.
_KNOWN: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


class StandIn:
    """In place of an object whose class is not loaded; keeps what it was built from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Unpickler(pickle.Unpickler):
    """That of the standard library, over the names that are known."""

    def find_class(self, module: str, name: str) -> Any:
        """What is listed, or a stand-in.

        Raises:
            pickle.UnpicklingError: the name is a path to something inside a module or class.
        """
        if "." in name:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        return type(name, (StandIn,), {})


def load(stream: IO[bytes], **settings: Any) -> Any:
    """`pickle.load` with that `Unpickler`."""
    return Unpickler(stream, **settings).load()


#: As `torch.load` wants its `pickle_module`; it uses both, by the file's format.
_MODULE = SimpleNamespace(Unpickler=Unpickler, load=load, __name__=__name__)


def load_pickle(file: Path, stream: IO[bytes]) -> Any:
    """What a pickle holds.

    Raises:
        ConversionError: it is broken, or asks for what no checkpoint needs; names the file.
    """
    return _named(file, lambda: load(stream))


def load_torch(file: Path, stream: IO[bytes]) -> Any:
    """What `torch.save` wrote; raises as `load_pickle` does."""
    return _named(
        file,
        lambda: torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_MODULE),
    )


def _named(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise ConversionError(f"{file} cannot be read: {first_line(error)}") from None
