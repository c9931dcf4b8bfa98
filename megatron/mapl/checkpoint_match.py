# SPDX-License-Identifier: Apache-2.0
"""Which of a checkpoint's boundaries are this run's.

A projector is saved under the cut that it stands at, `mapl.cut_<layers before it>.*`, and an anchor
table under its stage's layers, `mapl.stage_<first>_<last>.*`, so that another pipeline size finds
the cuts that it shares.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import print_rank_0

from mapl.codecs import LowRankCodec
from megatron.mapl.arguments import PREFIX
from megatron.mapl.model import VOCABULARY_TABLES, StageBoundaries
from megatron.mapl.runtime import MaplRuntime

#: Key → global shape of the tensors of boundaries in a checkpoint.
Shapes = dict[str, tuple[int, ...]]


def match(saved_args: Any, args: Any, runtime: MaplRuntime, saved: Shapes) -> str | None:
    """Settles what to read if the checkpoint's boundaries fit this run's.

    What exists must fit; a changed pipeline may bring cuts that start fresh.

    Returns:
        What does not fit, the same on all processes, or None.
    """
    trained = runtime.config.projector != "none" or runtime.config.anchor != "none"
    if trained and not parts_of_function(saved):
        return "it holds a model without MAPL boundaries"
    for name in ("anchor", "projector"):
        before, now = getattr(saved_args, PREFIX + name, None), getattr(runtime.config, name)
        if before != now and (trained or parts_of_function(saved)):
            return f"--mapl-{name} {now} differs from the checkpoint's {before}"
    layout = ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    same_pipeline = all(getattr(saved_args, x, None) == getattr(args, x) for x in layout)
    problems: list[str] = []
    notes = _other_codecs(saved_args, runtime)
    for stage in runtime.stages:
        _match_stage(stage, saved, same_pipeline, problems, notes)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, (problems, notes, [(s.first_layer, _tables(s)) for s in runtime.stages])
    )
    for found, _, _ in everyone:
        if found:
            return str(found[0])
    for note in sorted({note for _, said, _ in everyone for note in said}):
        print_rank_0(f"> {note}")
    # Megatron wants to know one reader of a saved tensor from the others, its replicas.
    readers = {stage: tables for _, _, stages in everyone for stage, tables in stages}
    for stage in runtime.stages:
        stage.table_readers = {
            key: sum(key in readers[first] for first in readers if first < stage.first_layer)
            for key in _tables(stage)
        }
        expect_fresh(stage, set(stage.states()) - set(stage.load_sources or {}))
    return None


def _other_codecs(saved_args: Any, runtime: MaplRuntime) -> list[str]:
    """Notes: codecs are no part of the model's function, but what they round is felt."""
    notes = []
    for name in ("forward_codec", "backward_codec"):
        before, now = getattr(saved_args, PREFIX + name, None), getattr(runtime.config, name)
        if before is not None and before != now:
            flag = f"--mapl-{name.replace('_', '-')}"
            notes.append(f"{flag} is {' '.join(now)}, in the checkpoint {' '.join(before)}")
    return notes


def _tables(stage: StageBoundaries) -> list[str]:
    """The keys that this stage's anchor is read from."""
    sources = stage.load_sources or {}
    return [key for name, key in sources.items() if name.startswith("anchor.")]


def _match_stage(
    stage: StageBoundaries,
    saved: Shapes,
    same_pipeline: bool,
    problems: list[str],
    notes: list[str],
) -> None:
    """Fills `stage.load_sources`: name of a state → key in the checkpoint."""
    table = _table_for(stage, saved)
    sources: dict[str, str] = {}
    for name, (key, tensor) in stage.states().items():
        if name.startswith("anchor."):
            if table is None:
                problems.append("it has no anchor tables")
                continue
            source = f"{table}.{key.rsplit('.', 1)[1]}"
            if source != key:
                notes.append(f"{key} is new in this pipeline: it starts as {source}")
        elif ".projector." in name:
            source = key
        else:
            if _fits(key, name, stage, saved, notes):
                sources[name] = key
            continue
        if source not in saved:
            if same_pipeline:
                problems.append(f"{key} is not in it, so this boundary was not compressed")
            elif key.endswith(".A"):
                cut = key.split(".")[1]
                notes.append(f"{cut} is new in this pipeline: its projector starts fresh")
            continue
        # The vocabulary may be padded otherwise for another tensor parallel size.
        free = 1 if key.endswith(VOCABULARY_TABLES) else 0
        if saved[source][free:] != tuple(tensor.shape)[free:]:
            rows = "; give its --mapl-anchor-buckets" if key.endswith(".B") else ""
            problems.append(
                f"{source} has shape {list(saved[source])}, this run's flags ask for "
                f"{list(tensor.shape)}{rows}"
            )
        sources[name] = source
    for port in (stage.inlet, stage.outlet):
        if port is not None and port.projector is None and port.cut in cuts(saved):
            problems.append(f"its boundary after layer {port.cut} is compressed, here it is not")
    stage.load_sources = sources


def _fits(key: str, name: str, stage: StageBoundaries, saved: Shapes, notes: list[str]) -> bool:
    """Whether a count of payloads or a codec's state is loaded, or starts anew.

    A codec is no part of the model's function: another one, or other sizes, need no permission.
    Both ends hold the codebook, so they decide alike by its shape. The Q of lowrank is with the end
    that sends alone.
    """
    if ".payloads" in name:
        return key in saved
    codec_key, codec_name = key.rsplit(".", 1)[0], name.rsplit(".", 1)[0]
    if isinstance(codec := stage.get_submodule(codec_name), LowRankCodec):
        fits = saved.get(key) == tuple(codec.Q.shape)
        if not fits:
            notes.append(f"{codec_key}: the checkpoint has no Q of this size; it starts fresh")
        return fits
    codebook = stage.get_buffer(f"{codec_name}.codebook")
    fits = saved.get(f"{codec_key}.codebook") == tuple(codebook.shape)
    if not fits:
        notes.append(f"{codec_key}: the checkpoint has no codebooks of this size; they start fresh")
    return fits


def _table_for(stage: StageBoundaries, saved: Shapes) -> str | None:
    """The saved anchor table that is nearest to this stage's.

    Its own; else that of the old stage that began at the same cut (whose decoder used it); else of
    the one that ended at the same cut; else of the one that began nearest.
    """
    stages = {
        (int(match[1]), int(match[2]))
        for key in saved
        if (match := re.fullmatch(r"mapl\.stage_(\d+)_(\d+)\.\w+", key))
    }
    if not stages:
        return None

    def distance(old: tuple[int, int]) -> tuple[bool, bool, bool, int, int]:
        starts = old[0] == stage.first_layer and stage.inlet is not None
        ends = old[1] == stage.last_layer and stage.outlet is not None
        return not (starts and ends), not starts, not ends, abs(old[0] - stage.first_layer), old[0]

    exact = (stage.first_layer, stage.last_layer)
    best = exact if exact in stages else min(stages, key=distance)
    return f"mapl.stage_{best[0]}_{best[1]}"


def expect_fresh(stage: StageBoundaries, names: set[str]) -> None:
    """Tells torch that these states are not missing from the checkpoint by mistake."""

    def forgive(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [
            key
            for key in keys.missing_keys
            if not ("mapl." in key and key.rsplit("mapl.", 1)[1] in names)
        ]

    if names:
        stage.register_load_state_dict_post_hook(forgive)


def parts_of_function(saved: Shapes) -> set[str]:
    """The keys of what makes the model another function than without boundaries."""
    return {key for key in saved if not re.search(r"\.(payloads|\w+_codec\.\w+)$", key)}


def cuts(saved: Shapes) -> set[int]:
    return {int(m[1]) for key in saved if (m := re.fullmatch(r"mapl\.cut_(\d+)\.A", key))}
