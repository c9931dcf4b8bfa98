# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation a call takes: the one place where that is decided."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

#: The environment variable that forces one implementation, and its values.
VARIABLE = "MAPL_OPS"
CHOICES = ("reference", "triton")


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on `tensor` run as Triton kernels.

    They do for CUDA tensors where triton is installed, unless MAPL_OPS=reference. MAPL_OPS=triton
    asks for kernels everywhere: on a CPU they need Triton's interpreter (TRITON_INTERPRET=1), which
    is for tests, being thousands of times slower.

    Args:
        tensor: an operand; all operands of an operation are on one device.

    Raises:
        ValueError: MAPL_OPS has another value.
        RuntimeError: MAPL_OPS=triton where there is no triton, or no GPU and no interpreter.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in CHOICES:
        raise ValueError(
            f"{VARIABLE}={forced} is not a choice; use {' or '.join(CHOICES)}, or leave it out"
        )
    if not forced:
        return tensor.is_cuda and _installed()
    if forced == "triton" and not _installed():
        raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed: pip install triton")
    if forced == "triton" and not tensor.is_cuda and not _interpreted():
        raise RuntimeError(
            f"{VARIABLE}=triton with a tensor on {tensor.device}: kernels need a GPU; "
            f"use {VARIABLE}=reference there, or TRITON_INTERPRET=1 in a test"
        )
    return forced == "triton"


def runs_gemms(tensor: Tensor) -> bool:
    """Whether kernels that multiply matrices fit the device of `tensor`, for which `use_triton`.

    Their tiles take up to 200 kB of shared memory: Hopper (compute capability 9.0) and later have
    that, older GPUs do not, and take what is in plain torch.
    """
    return not tensor.is_cuda or _capability(tensor.device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
