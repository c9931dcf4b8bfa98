# SPDX-License-Identifier: Apache-2.0
"""CPU mode: Megatron-LM on gloo, on a machine without a GPU.

Megatron asks `torch.cuda` for devices, streams, events and generators all over its code. CPU mode
answers those calls with stand-ins that act on the CPU. Two steps, because some of the answers are
needed while Megatron is being imported:

1. `install()` before the first import of Megatron: the stand-ins for `torch.cuda`, and a function
   mode that sends every request for device "cuda" to the CPU.
2. `patch_megatron()` after the import: the few Megatron functions that reach into CUDA directly.

Nothing here runs on a machine with a GPU.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron.mapl import cpu_matmul
from megatron.mapl.patching import replace

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device arguments: whatever is asked of "cuda" is done on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(_to_cpu, args[1:]))
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron sorts gradients by type names that start with "torch.cuda.".
            return result.replace("torch.", "torch.cuda.")
        return result


def _to_cpu(device: Any) -> Any:
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


class _Event:
    """A CUDA event of a machine on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any, **kwargs: Any) -> None: ...

    def wait(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    """The one stream of a CPU: the program order."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None: ...


class _DeviceProperties:
    """What Megatron reads of a device: a recent architecture, so that it asks for no workaround."""

    name = "cpu"
    major, minor = 9, 0
    multi_processor_count = 1
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_MEMORY_STATS = dict.fromkeys(
    (
        "num_ooms",
        "allocation.all.current",
        "allocated_bytes.all.current",
        "allocated_bytes.all.peak",
        "active.all.peak",
    ),
    0,
)


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _always(value: Any) -> Callable[..., Any]:
    """A new function each time: torch's compiler refuses one function under two names."""
    return lambda *args, **kwargs: value


def _no_device(*args: Any) -> contextlib.nullcontext[None]:
    """Stands in for `torch.cuda.device`; where it does, this process is in CPU mode."""
    return contextlib.nullcontext()


def _cuda_stand_ins() -> dict[str, Any]:
    """`torch.cuda` names and what stands in for them."""
    return {
        "is_available": _always(True),
        "device_count": _always(1),
        "current_device": _always(CPU),
        "set_device": _always(None),
        "device": _no_device,
        "get_device_properties": _always(_DeviceProperties),
        "get_device_capability": _always((9, 0)),
        "synchronize": _always(None),
        "Event": _Event,
        "Stream": _Stream,
        "stream": lambda *args: contextlib.nullcontext(),
        "set_stream": _always(None),
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "is_current_stream_capturing": _always(False),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "empty_cache": _always(None),
        "reset_peak_memory_stats": _always(None),
        "memory_stats": lambda *args, **kwargs: dict(_MEMORY_STATS),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
        "memory_reserved": _always(0),
        "max_memory_reserved": _always(0),
        "LongTensor": torch.LongTensor,
        "IntTensor": torch.IntTensor,
        "FloatTensor": torch.FloatTensor,
        "ByteTensor": torch.ByteTensor,
    }


def install() -> bool:
    """Goes to CPU mode if this machine has no GPU; to be called before Megatron is imported.

    A second call changes nothing.

    Returns:
        True in CPU mode, False on a machine with a GPU (then nothing was changed).
    """
    if getattr(torch.cuda, "device", None) is _no_device:
        return True
    if torch.cuda.is_available():
        return False
    # One connection is what Megatron's tensor parallelism checks for; it has no effect on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name, stand_in in _cuda_stand_ins().items():
        replace(torch.cuda, name, stand_in)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        replace(torch.cuda.random, name, getattr(torch.cuda, name))
    # Keeps torch's own data loader from pinning memory.
    replace(torch.accelerator, "is_available", _always(False))
    replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    # torch's compiler would ask the stand-ins for the properties of a real device.
    torch.compiler.set_stance("force_eager")
    if slow := cpu_matmul.slow_dtypes():
        cpu_matmul.install(slow)
    _CudaMeansCpu().__enter__()  # for the life of the process
    return True


def patch_megatron() -> None:
    """Replaces the Megatron functions that need a GPU; to be called after Megatron is imported."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.training.training as training

    replace(random, "_get_cuda_rng_state", _get_rng_state)
    replace(random, "_set_cuda_rng_state", _set_rng_state)
    # Its warm-up draws from the generator that initialises weights on a CPU, so that layouts with
    # and without sequence parallelism would start from different weights.
    replace(training, "set_jit_fusion_options", _always(None))
    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", _keep_on_cpu)


def _keep_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.cpu().numpy() if torch.is_tensor(tensor) and as_numpy else tensor


#: Megatron's arguments (by `dest`) that CPU mode sets unless the user does.
ARGUMENT_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}

#: Settings that would fail without a GPU: dest → (the flag, the one value that works).
_REQUIRED: dict[str, tuple[str, Any]] = {
    "distributed_backend": ("--distributed-backend", "gloo"),
    "transformer_impl": ("--transformer-impl", "local"),
    "context_parallel_size": ("--context-parallel-size", 1),
}


def check_arguments(args: Any) -> None:
    """Refuses flags that need a GPU.

    Raises:
        ValueError: naming the flag, its value and the value that works without a GPU.
    """
    if getattr(args, "use_layer_wise_distributed_optimizer", False) and args.data_parallel_size > 1:
        raise ValueError(
            f"--optimizer {args.optimizer} with --use-distributed-optimizer and "
            f"{args.data_parallel_size} data-parallel replicas gathers unequal parts, which gloo "
            "cannot; leave --use-distributed-optimizer out or run on GPUs"
        )
    for dest, (flag, works) in _REQUIRED.items():
        value = getattr(args, dest)
        if value != works:
            raise ValueError(
                f"{flag} {value} needs a GPU and this machine has none; "
                f"use {flag} {works} (the default here) or run on a GPU"
            )
