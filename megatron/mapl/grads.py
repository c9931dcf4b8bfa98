# SPDX-License-Identifier: Apache-2.0
"""What happens to a boundary's state once a step.

The projectors' gradients and the codebooks' statistics are summed over replicas here, over the two
sides of a boundary in exchange.py. The errors that gradients of low rank left end here. In one step
a projector may start anew in place of taking a gradient (projector_start.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from megatron.mapl import exchange, projector_start
from megatron.mapl.port import Port
from megatron.mapl.runtime import MaplRuntime


def finalize(
    model: list[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
    *,
    runtime: MaplRuntime,
) -> None:
    """Megatron's `finalize_model_grads_func`: its own part, then the boundaries'.

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
            if port is not None:
                if projector_start.is_due(runtime, port):
                    projector_start.propose(port, stage)
                else:
                    _reduce_gradient(port, num_tokens, replicas, stage)
                _update_codebooks(port, stage.groups.tp_dp_cp)
                _end_step_of_lowrank(port, stage.groups.tp_dp_cp)
    if runtime.stages:
        exchange.run(runtime, replicas)
        runtime.guard.raise_if_faulty()
    for port in runtime.ports():
        if port.projector is not None and projector_start.is_due(runtime, port):
            port.projector.restart()


def _reduce_gradient(
    port: Port, num_tokens: torch.Tensor | None, replicas: Any, stage: Any
) -> None:
    """Averages this side's term of dA over the tokens of all replicas."""
    if port.projector is None or not port.projector.learns:
        return
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


def _update_codebooks(port: Port, everyone: Any) -> None:
    """Moves the codebooks of the codec that encodes here by the data of all replicas.

    One sum over all processes of the stage, so that all of them hold the same bits.

    Where tensor-parallel ranks hold the same tokens, each count is a multiple of the true one,
    which does not move a mean.
    """
    for codec in port.codebook_codecs():
        if not codec.sends:
            codec.update(None)
            continue
        statistics = codec.statistics()
        if everyone.size() > 1:
            dist.all_reduce(statistics, group=everyone)
        codec.update(statistics)


def _end_step_of_lowrank(port: Port, everyone: Any) -> None:
    """Forgets the error, and has all processes of the stage go on with the Q of the first one.

    So a checkpoint, which holds one Q for all of them, lets each continue bit for bit.
    """
    codec = port.sending_lowrank_codec()
    if codec is None:
        return
    codec.end_step()
    if everyone.size() > 1:
        dist.broadcast(codec.Q, group=everyone, group_src=0)
