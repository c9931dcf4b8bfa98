# SPDX-License-Identifier: Apache-2.0
"""Jobs on GPUs, with or without NVIDIA's packages, and on fewer GPUs than processes."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training import print_rank_0
from torch.distributed import ProcessGroup, ReduceOp

from megatron.mapl import arguments, attention


def argument_defaults() -> dict[str, Any]:
    """Megatron's arguments (by `dest`) that are set, unless the user does, for want of a package.

    Its own defaults ask for what Transformer Engine and Apex bring, and fail without them.
    """
    defaults: dict[str, Any] = {}
    if not HAVE_TE:
        defaults |= {
            "transformer_impl": "local",
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:  # a part of Apex
        defaults["gradient_accumulation_fusion"] = False
    return defaults


def settle(args: Any) -> None:
    """Chooses this process's GPU, and what its layers need of the data loader.

    Raises:
        ValueError: more processes than GPUs, with a backend that wants one for each; or gloo, with
            a flag that needs more of it than it does with tensors of a GPU.
    """
    if args.distributed_backend == "gloo":
        _check_gloo(args)
    devices = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.local_rank + 1))
    if processes > devices:
        if args.distributed_backend != "gloo":
            raise ValueError(
                f"--distributed-backend {args.distributed_backend} wants a GPU for each process, "
                f"but this machine has {devices} for {processes}; use --distributed-backend gloo, "
                f"with which processes share GPUs, or start {devices} here (--nproc-per-node); "
                "GPUs that CUDA_VISIBLE_DEVICES hides do not count"
            )
        args.local_rank %= devices  # what Megatron takes for the number of the device
        print_rank_0(f"> {processes} processes share {devices} GPU(s) of this machine, over gloo")
    if attention.wanted(args):
        args.create_attention_mask_in_dataloader = False  # causal, which needs no s × s mask


#: Why gloo does not do what a flag needs of it.
_COALESCED = "gradients and parameters are exchanged in coalesced collectives"
_OWN_TRANSFERS = "tensors are sent without the staging that gloo needs"

#: Flags of Megatron that fail over gloo on GPUs: dest → (flag, why).
_NOT_OVER_GLOO = {
    "use_distributed_optimizer": ("--use-distributed-optimizer", _COALESCED),
    "use_layer_wise_distributed_optimizer": ("--use-distributed-optimizer", _COALESCED),
    "overlap_grad_reduce": ("--overlap-grad-reduce", _COALESCED),
    "overlap_param_gather": ("--overlap-param-gather", _COALESCED),
    "use_ring_exchange_p2p": ("--use-ring-exchange-p2p", _OWN_TRANSFERS),
}


def _check_gloo(args: Any) -> None:
    """Refuses what torch's gloo does with tensors on the CPU alone.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    for dest, (flag, why) in _NOT_OVER_GLOO.items():
        if getattr(args, dest, False):
            raise ValueError(
                f"{flag} does not work on GPUs over --distributed-backend gloo: with it, {why}; "
                f"leave {flag} out, or use --distributed-backend nccl"
            )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size} does not work on GPUs over "
            f"--distributed-backend gloo: with it, {_OWN_TRANSFERS}; use --context-parallel-size "
            "1, or use --distributed-backend nccl"
        )
    if args.data_parallel_size > 1:
        raise ValueError(
            f"--distributed-backend gloo does not work on GPUs with {args.data_parallel_size} "
            f"data-parallel replicas: {_COALESCED}; start 1/{args.data_parallel_size} of the "
            f"{args.world_size} processes, raise --pipeline-model-parallel-size, or use "
            "--distributed-backend nccl"
        )
    spread = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    if args.num_experts and spread < args.tensor_model_parallel_size:
        replicas = args.tensor_model_parallel_size // spread
        raise ValueError(
            f"--num-experts {args.num_experts} does not work on GPUs over --distributed-backend "
            f"gloo with {replicas} replicas of each expert: {_COALESCED}; make "
            "--expert-model-parallel-size times --expert-tensor-parallel-size "
            f"{args.tensor_model_parallel_size}, the --tensor-model-parallel-size, or use "
            "--distributed-backend nccl"
        )
    if arguments.mtp_before_last_stage(args):
        raise ValueError(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} does not work "
            "on GPUs over --distributed-backend gloo: its prediction layers (m) stand before the "
            f"last stage, and {_OWN_TRANSFERS}; put them into the last stage, before L, or use "
            "--distributed-backend nccl"
        )


def without_lonely_reductions(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.all_reduce`, which does nothing where there is nobody to reduce with.

    gloo would copy the tensor, all gradients of a stage for one, to the host and back.
    """

    def reduce(
        tensor: torch.Tensor,
        op: Any = ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # Who is not of a group has an int in its place. PREMUL_SUM scales even what is alone.
        alone = isinstance(group, ProcessGroup) and group.size() == 1
        if alone and not async_op and op != ReduceOp.PREMUL_SUM:
            return None
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    return reduce
