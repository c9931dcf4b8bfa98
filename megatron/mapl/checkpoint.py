# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what of the boundaries is loaded from where, and the checks around it.

Before a load, what the checkpoint holds is compared with the run's boundaries
(checkpoint_match.py); what does not fit is refused, unless the user asked for a conversion. After a
load and before a save it is proven that both sides of every boundary hold the same projector, bit
for bit.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.training import checkpointing, print_rank_0

from mapl import stiefel
from megatron.mapl import metrics
from megatron.mapl.arguments import PREFIX
from megatron.mapl.checkpoint_match import Shapes, cuts, expect_fresh, match, parts_of_function
from megatron.mapl.errors import exit_with_error
from megatron.mapl.runtime import MaplRuntime

#: Settings of a run, not of a model: `--use-checkpoint-args` leaves them alone.
_OF_A_RUN = tuple(
    PREFIX + name
    for name in (
        "report_dir",
        "log_interval",
        "geometry_interval",
        "checkpoint",
        "receive_ahead",
        "tensor_parallel_split",
        "projector_exchange",
        "emulate_bandwidth",
        "emulate_latency",
    )
)


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
        converted = args.no_load_optim and not skip_optimizer
        if converted and scheduler is not None and not args.finetune:
            # Megatron loads the schedule with the optimizer alone; training goes on where it was.
            scheduler.step(increment=args.consumed_train_samples)
        if runtime is not None:
            for stage in runtime.stages:
                stage.load_sources = None
            for port in runtime.ports():
                port.take_counts()
            if args.finetune:
                _forget_momentum(runtime)
            check_sides(runtime)
            if runtime.subspace is not None:
                try:
                    runtime.subspace.settle(loaded=True)
                except ValueError as error:
                    exit_with_error(error)
        return result

    return prepare_and_load


def guarded_save(save: Callable[..., None], runtime: MaplRuntime) -> Callable[..., None]:
    """Megatron's `save_checkpoint`, before which both sides are compared; writes the traffic."""

    def check_and_save(*args: Any, **kwargs: Any) -> None:
        check_sides(runtime)
        for port in runtime.ports():
            port.note_counts()
        save(*args, **kwargs)
        metrics.write_traffic(runtime)

    return check_and_save


def check_sides(runtime: MaplRuntime) -> None:
    """Compares projector, momentum and codebooks of every boundary over all that hold them.

    Raises:
        RuntimeError: two copies differ, or a projector has left the manifold.
    """
    own: dict[tuple[int, str], str] = {}
    lost: list[str] = []
    for port in runtime.ports():
        if port.projector is not None and runtime.config.projector != "unconstrained":
            try:
                stiefel.check(port.projector.A, name=f"the projector of boundary {port.boundary}")
            except RuntimeError as error:  # told to all processes, which else would wait here
                lost.append(str(error))
        for name, tensors in port.shared_states().items():
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.cpu().numpy().tobytes())
            own[port.boundary, name] = digest.hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, lost))
    for _, errors in everyone:
        if errors:
            raise RuntimeError(errors[0])
    first: dict[tuple[int, str], tuple[int, str]] = {}
    for rank, (digests, _) in enumerate(everyone):
        for (boundary, name), digest in digests.items():
            other, expected = first.setdefault((boundary, name), (rank, digest))
            if digest != expected:
                raise RuntimeError(
                    f"the {name} of boundary {boundary} differs between ranks {other} and {rank}: "
                    "both must run the same versions on the same kind of device; resume from an "
                    "earlier checkpoint"
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
    problem = match(state.get("args"), args, runtime, saved)
    if problem is None:
        return
    if runtime.config.checkpoint != "fresh":
        raise ValueError(
            f"--load {directory}: {problem}; use the checkpoint's settings, or --mapl-checkpoint "
            "fresh to load the model and start the boundaries anew (the loss will jump)"
        )
    for stage in runtime.stages:
        stage.load_sources = {}
        expect_fresh(stage, set(stage.states()))
    args.no_load_optim = True
    print_rank_0(
        f"> --mapl-checkpoint fresh: {directory} gives the model; all boundaries and the optimizer "
        f"start anew, because {problem}"
    )


def _prepare_plain_load(args: Any, directory: str, saved: Shapes) -> None:
    if not parts_of_function(saved):
        if args.mapl_checkpoint == "drop":
            print_rank_0(f"> --mapl-checkpoint drop: {directory} has no boundaries to drop")
        return
    places = ", ".join(str(cut) for cut in sorted(cuts(saved)))
    if args.mapl_checkpoint != "drop":
        raise ValueError(
            f"--load {directory} was trained through boundaries after layers {places}: without "
            "them it is another function and its loss will jump; add --mapl-rank, or "
            "--mapl-checkpoint drop to load the model without them"
        )
    args.no_load_optim = True
    print_rank_0(
        f"> --mapl-checkpoint drop: the boundaries of {directory} after layers {places} are left "
        "out, the optimizer starts anew; expect the loss to jump"
    )


def _forget_momentum(runtime: MaplRuntime) -> None:
    for projector in runtime.projectors():
        if projector.momentum is not None:
            projector.momentum.zero_()
