# SPDX-License-Identifier: Apache-2.0
"""Settings of MAPL as flags: read from a command line, carried over to another model, written.

Read without Megatron, which `megatron/mapl/arguments.py` needs to generate the same flags.
"""

import math
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mapl.config import MaplConfig
from mapl.presets import with_preset

#: How a run was measured and reported, not what it sends.
_OF_THE_RUN = ("virtual_stages", "checkpoint", "report_dir", "log_interval", "geometry_interval")

#: Ranks that kernels like.
_MULTIPLE = 8


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: in tables.
        flags: of MAPL, name of a field of `MaplConfig` → value; none for plain Megatron.
        gap: how far its validation loss was above the uncompressed run's, in percent; None: not
            measured.
    """

    name: str
    flags: Mapping[str, Any]
    gap: float | None = None

    @cached_property
    def config(self) -> MaplConfig | None:
        """None for plain Megatron.

        Raises:
            ValueError: flags that do not fit each other.
        """
        return MaplConfig(**self.flags) if self.flags else None

    @property
    def command_line(self) -> str:
        """The flags to paste."""
        words = []
        for name, value in self.flags.items():
            if name == "tensor_parallel_split":
                words.append("--mapl-no-tensor-parallel-split")
                continue
            words.append(f"--mapl-{name.replace('_', '-')}")
            words += map(str, value if isinstance(value, list) else [value])
        return shlex.join(words)


def read(flags: Sequence[str]) -> dict[str, Any]:
    """The settings among the flags of a run, its preset filled in; empty for plain Megatron.

    Raises:
        ValueError: a `--mapl-*` flag that there is not, or a value that is not of its type.
    """
    types_by_name = get_type_hints(MaplConfig)
    given: dict[str, Any] = {}
    preset = None
    for flag, values in _grouped(flags):
        if not flag.startswith("--mapl-"):
            continue
        name = flag.removeprefix("--mapl-").replace("-", "_")
        if name == "preset":
            preset = values[0] if values else ""
        elif name == "no_tensor_parallel_split":
            given["tensor_parallel_split"] = False
        elif name in types_by_name and values:
            given[name] = _value(flag, values, types_by_name[name])
        else:
            raise ValueError(f"{' '.join([flag, *values])}: this version has no such setting")
    if "rank" not in given:
        return {}
    return {k: v for k, v in with_preset(preset, given).items() if k not in _OF_THE_RUN}


def carried_over(flags: Mapping[str, Any], width: int, hidden_size: int) -> dict[str, Any]:
    """The settings of a model of width d for one of width d′: r/d and its like stay the same.

    Ranks are rounded up to a multiple of 8 (and of what rvq's parts take), at most d′.

    Args:
        flags: as `read` gives them, with one rank for all boundaries.
        width: d.
        hidden_size: d′.

    Raises:
        ValueError: they have a rank for each boundary.
    """
    if not flags:
        return {}
    if len(flags["rank"]) != 1:
        raise ValueError("it has a rank for each boundary of its own pipeline")
    (rank,) = flags["rank"]
    groups = flags.get("rvq_groups")
    part = rank // groups if groups else 1
    carried = dict(flags)
    if width != hidden_size:
        new = _scaled(rank, width, hidden_size, math.lcm(_MULTIPLE, part))
        carried["rank"] = [new]
        for name in ("anchor_rank", "topk", "lowrank_q"):
            if name in flags:
                carried[name] = _scaled(flags[name], width, hidden_size, _MULTIPLE)
        if groups:
            carried["rvq_groups"] = new // part
    return carried


def _scaled(size: int, width: int, hidden_size: int, multiple: int) -> int:
    if size == width:
        return hidden_size
    return min(hidden_size, -(-size * hidden_size // (width * multiple)) * multiple)


def _grouped(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with its values."""
    grouped: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            grouped.append((flag, [value] if equals else []))
        elif grouped:
            grouped[-1][1].append(word)
    return grouped


def _value(flag: str, values: list[str], kind: Any) -> Any:
    """Values as the field of a dataclass has them."""
    if get_origin(kind) in (types.UnionType, Union):
        kind = next(option for option in get_args(kind) if option is not type(None))
    one = get_args(kind)[0] if get_origin(kind) is list else kind
    try:
        if get_origin(one) is Literal:
            if unknown := [value for value in values if value not in get_args(one)]:
                raise ValueError(unknown)
            read = list(values)
        else:
            read = [one(value) for value in values]
    except ValueError:
        raise ValueError(f"{flag} {' '.join(values)}: this version has no such value") from None
    if get_origin(kind) is list:
        return read
    if len(read) != 1:
        raise ValueError(f"{flag} {' '.join(values)}: it takes one value")
    return read[0]
