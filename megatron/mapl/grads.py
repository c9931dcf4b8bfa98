# SPDX-License-Identifier: Apache-2.0
"""The projectors' gradients, once a step: averaged over replicas, summed over the two sides.

Each side of a boundary accumulates its own term of dA. Both terms are exchanged, and a + b = b + a
bit for bit, so that both sides hold the same gradient, take the same deterministic step, and keep
bitwise the same projector without ever sending it.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from megatron.mapl.runtime import MaplRuntime


def finalize(
    model: list[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
    *,
    runtime: MaplRuntime,
) -> None:
    """Megatron's `finalize_model_grads_func`: its own part, then the projectors' gradients.

    Args:
        model, num_tokens, pg_collection, force_all_reduce: as Megatron passes them. With per-token
            loss its own part turns `num_tokens` into the tokens of the global batch.

    Raises:
        PayloadError: a payload of this step was not what was due (see `PayloadGuard`).
    """
    finalize_model_grads(
        model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
    )
    runtime.guard.raise_if_faulty()
    replicas = (
        pg_collection.dp_cp
        if pg_collection is not None
        else parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    for stage in runtime.stages:
        for port in (stage.inlet, stage.outlet):
            if port is None or port.projector is None or not port.projector.learns:
                continue
            gradient = port.projector.grad
            assert gradient is not None
            if replicas.size() > 1:
                dist.all_reduce(gradient, group=replicas)
            if num_tokens is None:
                gradient /= replicas.size()
            else:
                gradient /= num_tokens.clamp(min=1)
            if stage.sequence_parallel and stage.groups.tp.size() > 1:
                dist.all_reduce(gradient, group=stage.groups.tp)
    if runtime.stages:
        with runtime.communicating():
            _sum_over_sides(runtime, runtime.stages[0].groups.pp)
        runtime.guard.raise_if_faulty()


def _sum_over_sides(runtime: MaplRuntime, pipeline: Any) -> None:
    """Adds to each projector's gradient the one that the other side of its boundary holds."""
    ports = [p for p in runtime.ports() if p.projector is not None and p.projector.learns]
    sending = {id(port) for port in runtime.outlets()}
    operations, arriving = [], []
    for port in ports:
        assert port.projector is not None and port.projector.grad is not None
        gradient = port.projector.grad.unsqueeze(1)  # [d, 1, r]: a channel takes three dimensions
        peer_stage = port.boundary + 1 if id(port) in sending else port.boundary
        peer = dist.get_global_rank(pipeline, peer_stage % pipeline.size())
        payload = port.projector_channel.pack(gradient, None, runtime.ledger, 0)
        buffer = torch.empty_like(payload)
        operations += [
            dist.P2POp(dist.isend, payload, peer, pipeline),
            dist.P2POp(dist.irecv, buffer, peer, pipeline),
        ]
        arriving.append((port, gradient, buffer))
    if not operations:
        return
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for port, gradient, buffer in arriving:
        other = torch.empty_like(gradient)
        port.projector_channel.unpack(buffer, other, runtime.guard)
        gradient += other
