# SPDX-License-Identifier: Apache-2.0
"""Subspace Networks (arXiv 2506.01260), a baseline: `--mapl-projector subspace`.

One fixed U ∈ St(d, k) serves all boundaries, one frozen table F ~ N(0, 1) of V×d stands on every
stage. Boundaries do what they always do with a fixed projector and a static anchor,

    Z = (X − F[t]) U,    X̂ = Z Uᵀ + F[t],

and the model is held where that loses nothing:

1. stage 0 embeds x = E[t] + F[t];
2. at start, after a checkpoint is loaded and after every step of the optimizer, the attention's and
   the MLP's output projections become U Uᵀ W, and the embedding becomes E U Uᵀ;
3. the last `FREE_LAYERS` layers of the last stage, which sends nothing, are left free.

Weights are projected in the optimizer's fp32 copy, and the model's copy is cast from it, so that
16-bit rounding does not add up over steps.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import print_rank_0
from torch import Tensor, nn

from mapl.subspace import departure, project_
from megatron.mapl.model import StageBoundaries, input_ids
from megatron.mapl.runtime import MaplRuntime

#: Layers at the end of the last stage that are not constrained, or as many as it has.
FREE_LAYERS = 2

#: ‖W − U Uᵀ W‖ / ‖W‖ of a weight that lies in the subspace up to fp32 rounding. Such a weight is
#: left as it is when a checkpoint is loaded, so that a resumed run continues bit for bit.
TOLERANCE = 1e-5


class Subspace:
    """The constraint on the weights of one process."""

    def __init__(self, runtime: MaplRuntime) -> None:
        self._runtime = runtime
        self._chunks: list[Any] = []

    def attach(self, chunks: list[Any]) -> list[Any]:
        """Megatron's pre-wrap hook, behind the boundaries' own."""
        self._chunks[:] = chunks
        for chunk in chunks:
            if chunk.pre_process:
                hook = partial(_add_table, self._runtime.stages[0])
                chunk.embedding.register_forward_hook(hook, with_kwargs=True)
        return chunks

    def check_optimizer(self) -> None:
        """To be called when the optimizer has been built.

        Raises:
            RuntimeError: it does not hold a weight whole, in fp32.
        """
        for weight, _ in self.weights():
            main = _main(weight)
            if main.numel() != weight.numel() or main.dtype != torch.float32:
                raise RuntimeError(
                    f"the optimizer holds {main.numel()} numbers ({main.dtype}) of a weight of "
                    f"shape {tuple(weight.shape)}; --mapl-projector subspace needs all of them in "
                    "fp32: use Adam or Muon without --use-distributed-optimizer"
                )

    def settle(self, *, loaded: bool) -> None:
        """Projects the weights that are outside of the subspace: at start, and after a load.

        Args:
            loaded: whether the weights are those of a checkpoint. If it was trained otherwise, or
                with other free layers, rank 0 says that they were moved.

        Raises:
            ValueError: the boundaries do not all hold the same U.
        """
        moved = sum(self._settle(weight, dim) for weight, dim in self.weights())
        own = [
            (port.boundary, hashlib.sha256(port.projector.A.cpu().numpy().tobytes()).hexdigest())
            for port in self._runtime.ports()
            if port.projector is not None
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        groups = self._runtime.stages[0].groups
        counts = groups.tp.rank() == groups.dp_cp.rank() == 0  # others hold the same weights
        dist.all_gather_object(everyone, (own, moved if counts else 0))
        subspaces = dict(item for digests, _ in everyone for item in digests)
        for boundary, digest in sorted(subspaces.items()):
            if digest != subspaces[0]:
                raise ValueError(
                    f"--mapl-projector subspace: boundaries 0 and {boundary} hold different "
                    "subspaces, because those that the checkpoint does not have start from "
                    f"--seed {self._runtime.seed}; use the --seed that it was trained with"
                )
        total = sum(count for _, count in everyone)
        if loaded and total:
            print_rank_0(
                f"> --mapl-projector subspace: {total} weights of the checkpoint were outside of "
                "the subspace and have been projected into it; expect the loss to jump"
            )

    def project(self) -> None:
        """After a step of the optimizer. Nothing waits for the device."""
        for weight, dim in self.weights():
            main = _main(weight).view_as(weight)
            project_(main, self._u(), dim)
            if main.data_ptr() != weight.data_ptr():
                weight.detach().copy_(main)

    def weights(self) -> Iterator[tuple[nn.Parameter, int]]:
        """The constrained weights of this process, each with its dimension that is d wide."""
        last = self._runtime.stages[-1]
        first_free = last.last_layer
        if last.outlet is None:
            first_free = max(last.first_layer, last.last_layer - FREE_LAYERS)
        for chunk in self._chunks:
            if chunk.pre_process:
                yield chunk.embedding.word_embeddings.weight, 1
            for layer in chunk.decoder.layers:
                if layer.layer_number <= first_free:  # it counts from 1
                    yield layer.self_attention.linear_proj.weight, 0
                    yield layer.mlp.linear_fc2.weight, 0

    def _u(self) -> Tensor:
        return self._runtime.projectors()[0].A.detach()

    def _settle(self, weight: nn.Parameter, dim: int) -> bool:
        """Whether the weight had to move."""
        main = _main(weight).view_as(weight)
        wide = main.float()
        # Without an optimizer there are 16-bit weights alone, which rounding itself takes outside.
        tolerance = max(TOLERANCE, torch.finfo(main.dtype).eps)
        moves = bool(departure(wide, self._u(), dim) > tolerance)
        if moves:
            project_(wide, self._u(), dim)
            main.copy_(wide)
        weight.detach().copy_(main)
        return moves


def _main(weight: nn.Parameter) -> Tensor:
    """What the optimizer steps: an fp32 copy of a 16-bit weight, or the weight itself.

    The distributed optimizer's is flat.
    """
    main: Tensor | None = getattr(weight, "main_param", None)
    return (weight if main is None else main).detach()


def _add_table(
    stage: StageBoundaries,
    embedding: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    embedded: Tensor,
) -> Tensor:
    """x = E[t] + F[t], [s, b, d]; a forward hook of the embedding."""
    coordinates = stage.anchor(stage.local_ids(input_ids(args, kwargs)))
    assert coordinates is not None
    table: Tensor = coordinates.gathered()
    return embedded + table


#: Megatron's settings that take the residual stream out of the subspace, or its weights apart:
#: dest, the values that it may have, flag, why, remedy. All of them are refused at start.
_NEEDED: list[tuple[str, tuple[Any, ...], str, str, str]] = [
    (
        "add_bias_linear",
        (False,),
        "biases (no --disable-bias-linear)",
        "those of output projections leave the subspace",
        "add --disable-bias-linear",
    ),
    (
        "untie_embeddings_and_output_weights",
        (True,),
        "tied embeddings (no --untie-embeddings-and-output-weights)",
        "the embedding is projected, the output layer is not",
        "add --untie-embeddings-and-output-weights",
    ),
    (
        "hidden_dropout",
        (0.0,),
        "--hidden-dropout",
        "what dropout leaves of a vector is not in the subspace",
        "use --hidden-dropout 0",
    ),
    (
        "position_embedding_type",
        ("rope", "yarn", "mrope", "none", "relative"),
        "--position-embedding-type",
        "what is added to the embedding leaves the subspace",
        "use --position-embedding-type rope",
    ),
    (
        "num_experts",
        (None,),
        "--num-experts",
        "the experts' output projections are not constrained",
        "leave it out",
    ),
    (
        "mtp_num_layers",
        (None, 0),
        "--mtp-num-layers",
        "the method says nothing about layers that embed tokens again",
        "leave it out",
    ),
    (
        "experimental_attention_variant",
        (None,),
        "--experimental-attention-variant",
        "its output projection is not constrained",
        "leave it out",
    ),
    (
        "apply_residual_connection_post_layernorm",
        (False,),
        "--apply-residual-connection-post-layernorm",
        "the gain of a norm in the residual stream leaves the subspace",
        "leave it out",
    ),
    *(
        (dest, (None, False), flag, "weights are projected in fp32", "leave it out")
        for dest, flag in (
            ("fp8", "--fp8-format"),
            ("fp4", "--fp4-format"),
            ("use_precision_aware_optimizer", "--use-precision-aware-optimizer"),
        )
    ),
    (
        "use_torch_fsdp2",
        (False,),
        "--use-torch-fsdp2",
        "no process holds a weight whole",
        "leave it out",
    ),
]


def check_supported(args: Any) -> None:
    """Refuses what the constraint cannot hold with.

    Raises:
        ValueError: names the flag, its value and what to do.
    """
    for dest, allowed, flag, why, remedy in _NEEDED:
        value = getattr(args, dest, allowed[0])
        if value not in allowed:
            shown = flag if isinstance(value, bool) else f"{flag} {value}"
            raise ValueError(
                f"{shown} cannot be used with --mapl-projector subspace: {why}; {remedy}"
            )
    replicas = args.data_parallel_size * args.context_parallel_size
    # Megatron turns the flag into the second setting for Muon, whose shards are whole weights.
    shards = args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer
    if replicas > 1 and shards:
        raise ValueError(
            f"--use-distributed-optimizer over {replicas} replicas cannot be used with "
            "--mapl-projector subspace: no process holds the optimizer's copy of all weights; "
            "leave it out (and use --optimizer muon, not dist_muon)"
        )
