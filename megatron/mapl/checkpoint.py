# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what of the boundaries is loaded from where, and the checks around it.

Megatron's distributed checkpoint keeps each projector under the cut that it stands at
(`mapl.cut_<layers before it>.*`) and each anchor table under its stage's layers
(`mapl.stage_<first>_<last>.*`). Before a load this module compares these keys with the run's
boundaries and settles what to read; after a load and before a save it proves that both sides of
every boundary hold the same projector, bit for bit.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.training import checkpointing, print_rank_0

from mapl import stiefel
from megatron.mapl import metrics
from megatron.mapl.arguments import PREFIX
from megatron.mapl.errors import exit_with_error
from megatron.mapl.model import VOCABULARY_TABLES, StageBoundaries
from megatron.mapl.runtime import MaplRuntime

Shapes = dict[str, tuple[int, ...]]


#: Settings of a run, not of a model: `--use-checkpoint-args` leaves them alone.
_OF_A_RUN = tuple(PREFIX + name for name in ("report_dir", "log_interval", "checkpoint"))


def taking_mapl_args(load_args: Callable[..., Any]) -> Callable[..., Any]:
    """`load_args_from_checkpoint` that takes the `--mapl-*` settings too, if the user gave none."""

    def load_args_with_mapl(args: Any, *more: Any, **kwargs: Any) -> Any:
        loaded = load_args(args, *more, **kwargs)
        given = [name for name in vars(args) if name.startswith(PREFIX)]
        if isinstance(loaded, tuple) and not set(given) - set(_OF_A_RUN):
            dropping = getattr(args, PREFIX + "checkpoint", None) == "drop"
            for name, value in vars(loaded[1]).items():
                known = name.startswith(PREFIX) and name not in _OF_A_RUN
                if known and value is not None and not dropping:
                    setattr(args, name, value)
        return loaded

    return load_args_with_mapl


def guarded_load(
    load: Callable[..., Any], args: Any, runtime: MaplRuntime | None
) -> Callable[..., Any]:
    """Megatron's `load_checkpoint` with the checks of this module around it."""

    def prepare_and_load(model: Any, optimizer: Any, scheduler: Any, **kwargs: Any) -> Any:
        skip_optimizer = args.no_load_optim
        try:
            _prepare_load(args, runtime)
        except ValueError as error:
            exit_with_error(error)
        result = load(model, optimizer, scheduler, **kwargs)
        if args.no_load_optim and not skip_optimizer and scheduler is not None:
            # Megatron loads the schedule with the optimizer alone; training goes on where it was.
            scheduler.step(increment=0 if args.finetune else args.consumed_train_samples)
        if runtime is not None:
            for stage in runtime.stages:
                stage.load_sources = None
            if args.finetune:
                _forget_momentum(runtime)
            check_sides(runtime)
        return result

    return prepare_and_load


def guarded_save(save: Callable[..., None], runtime: MaplRuntime) -> Callable[..., None]:
    """Megatron's `save_checkpoint`, before which both sides are compared; writes the traffic."""

    def check_and_save(*args: Any, **kwargs: Any) -> None:
        check_sides(runtime)
        save(*args, **kwargs)
        metrics.write_traffic(runtime)

    return check_and_save


def check_sides(runtime: MaplRuntime) -> None:
    """Compares projector and momentum of every boundary over all processes that hold them.

    Raises:
        RuntimeError: two copies differ, or a projector has left the manifold.
    """
    own: dict[int, str] = {}
    lost: list[str] = []
    for port in runtime.ports():
        if port.projector is None:
            continue
        if runtime.config.projector != "unconstrained":
            try:
                stiefel.check(port.projector.A, name=f"the projector of boundary {port.boundary}")
            except RuntimeError as error:  # told to all processes, which else would wait here
                lost.append(str(error))
        digest = hashlib.sha256()
        for tensor in port.projector.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        own[port.boundary] = digest.hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, lost))
    for _, errors in everyone:
        if errors:
            raise RuntimeError(errors[0])
    first: dict[int, tuple[int, str]] = {}
    for rank, (digests, _) in enumerate(everyone):
        for boundary, digest in digests.items():
            other, expected = first.setdefault(boundary, (rank, digest))
            if digest != expected:
                raise RuntimeError(
                    f"the projector of boundary {boundary} differs between ranks {other} and "
                    f"{rank}: both must run the same versions on the same kind of device; resume "
                    "from an earlier checkpoint"
                )


def _prepare_load(args: Any, runtime: MaplRuntime | None) -> None:
    """Settles what each state of this process's boundaries is read from.

    Raises:
        ValueError: the checkpoint's boundaries are not this run's and `--mapl-checkpoint` does not
            say what to do about it.
    """
    directory = args.load
    if args.pretrained_checkpoint is not None and not checkpointing.checkpoint_exists(directory):
        directory = args.pretrained_checkpoint
    state, path, _, kind = checkpointing._load_base_checkpoint(directory, args, rank0=True)
    if state is None:
        return
    if kind != checkpointing.CheckpointType.GLOBAL:
        if runtime is not None:
            raise ValueError(
                f"--load {directory} is a checkpoint of type {kind.name.lower()}; boundaries are "
                "loaded from --ckpt-format torch_dist alone: convert it first"
            )
        return
    tensors = dist_checkpointing.load_tensors_metadata(path)
    saved = {k: tuple(t.global_shape) for k, t in tensors.items() if k.startswith("mapl.")}
    if runtime is None:
        _prepare_plain_load(args, directory, saved)
        return
    problem = _match(state.get("args"), args, runtime, saved)
    if problem is None:
        return
    if runtime.config.checkpoint != "fresh":
        raise ValueError(
            f"--load {directory}: {problem}; use the checkpoint's settings, or --mapl-checkpoint "
            "fresh to load the model and start the boundaries anew (the loss will jump)"
        )
    for stage in runtime.stages:
        stage.load_sources = {}
        _expect_fresh(stage, set(stage.states()))
    args.no_load_optim = True
    print_rank_0(
        f"> --mapl-checkpoint fresh: {directory} gives the model; all boundaries and the optimizer "
        f"start anew, because {problem}"
    )


def _prepare_plain_load(args: Any, directory: str, saved: Shapes) -> None:
    if not saved:
        if args.mapl_checkpoint == "drop":
            print_rank_0(f"> --mapl-checkpoint drop: {directory} has no boundaries to drop")
        return
    cuts = ", ".join(str(cut) for cut in sorted(_cuts(saved)))
    if args.mapl_checkpoint != "drop":
        raise ValueError(
            f"--load {directory} was trained through MAPL boundaries after layers {cuts}: without "
            "them it is another function and its loss will jump; add --mapl-rank, or "
            "--mapl-checkpoint drop to load the model without them"
        )
    args.no_load_optim = True
    print_rank_0(
        f"> --mapl-checkpoint drop: the boundaries of {directory} after layers {cuts} are left "
        "out, the optimizer starts anew; expect the loss to jump"
    )


def _match(saved_args: Any, args: Any, runtime: MaplRuntime, saved: Shapes) -> str | None:
    """Settles what to read if the checkpoint's boundaries fit this run's.

    What exists must fit; a changed pipeline may bring cuts that start fresh.

    Returns:
        What does not fit, the same on all processes, or None.
    """
    if not saved:
        return "it holds a model without MAPL boundaries"
    for name in ("anchor", "projector"):
        before, now = getattr(saved_args, PREFIX + name, None), getattr(runtime.config, name)
        if before != now:
            return f"--mapl-{name} {now} differs from the checkpoint's {before}"
    layout = ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    same_pipeline = all(getattr(saved_args, x, None) == getattr(args, x) for x in layout)
    problems: list[str] = []
    notes: list[str] = []
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
        _expect_fresh(stage, set(stage.states()) - set(stage.load_sources or {}))
    return None


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
        else:
            source = key
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
            problems.append(
                f"{source} has shape {list(saved[source])}, this run's flags ask for "
                f"{list(tensor.shape)}"
            )
        sources[name] = source
    for port in (stage.inlet, stage.outlet):
        if port is not None and port.projector is None and port.cut in _cuts(saved):
            problems.append(f"its boundary after layer {port.cut} is compressed, here it is not")
    stage.load_sources = sources


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


def _expect_fresh(stage: StageBoundaries, names: set[str]) -> None:
    """Tells torch that these states are not missing from the checkpoint by mistake."""

    def forgive(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [
            key
            for key in keys.missing_keys
            if not ("mapl." in key and key.rsplit("mapl.", 1)[1] in names)
        ]

    if names:
        stage.register_load_state_dict_post_hook(forgive)


def _cuts(saved: Shapes) -> set[int]:
    return {int(m[1]) for key in saved if (m := re.fullmatch(r"mapl\.cut_(\d+)\.A", key))}


def _forget_momentum(runtime: MaplRuntime) -> None:
    for projector in runtime.projectors():
        if projector.momentum is not None:
            projector.momentum.zero_()
