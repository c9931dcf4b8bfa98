# SPDX-License-Identifier: Apache-2.0
"""Keeping to fp32 where the mathematics needs it: GEMM precision, accumulation, module casts."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Run fp32 GEMMs in fp32: no TF32, no bf16 passes, no autocast.

    Every precision setting is put back afterwards. PyTorch holds two sets of settings, a legacy
    global one and one per backend, and reading the first raises once a user has set the second;
    so both are saved here, and whichever API the user chose keeps working. The settings are global
    to the process: other threads' GEMMs are exact too for as long as this lasts.

    Args:
        device: where the GEMMs run; autocast is switched off for its type.
    """
    cuda = torch.backends.cuda.matmul
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    per_backend = cuda.fp32_precision, cpu.fp32_precision
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        cuda.fp32_precision, cpu.fp32_precision = per_backend


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for anything narrower, else ``dtype`` itself: fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


def mm_wide(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, accumulated in fp32 and given in fp32, for 16-bit inputs too.

    On CUDA 16-bit operands go into the GEMM as they are; elsewhere they are widened first. fp32
    operands heed torch's float32 matmul precision, which 16-bit ones lose nothing by.

    Args:
        left: [m, n].
        right: [n, p], of the same dtype.

    Returns:
        [m, p] fp32 (fp64 for fp64 inputs).
    """
    wide = accumulation_dtype(left.dtype)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return torch.mm(left.to(wide), right.to(wide))


def add_mm_wide(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> None:
    """total += alpha · (left @ right), as `mm_wide` multiplies; on CUDA in the GEMM itself.

    Args:
        total: [m, p] fp32 (fp64 for fp64 inputs), contiguous, changed in place.
        left: [m, n].
        right: [n, p], of the same dtype.
        alpha: factor of the product.
    """
    if left.is_cuda and left.dtype != total.dtype:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, alpha=alpha, out=total)
    else:
        total.add_(mm_wide(left, right), alpha=alpha)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The part of a module's ``_apply`` function that moves tensors, without the part that casts.

    Megatron casts the whole model with ``.bfloat16()``. A projector that has been to bf16 and back
    is off the Stiefel manifold by 2e-3, so tensors that must stay fp32 go through this instead.

    Args:
        fn: what ``nn.Module.to``, ``.bfloat16`` and so on hand to ``_apply``.
    """

    def follow(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return follow
