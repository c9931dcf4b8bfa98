# SPDX-License-Identifier: Apache-2.0
"""Matrix products in bf16 and fp16 on processors without instructions for them.

On such a processor (x86 without AVX-512, for one) torch multiplies 16-bit numbers in a scalar loop,
which was measured to take up to 70 times as long as converting to fp32, multiplying and rounding
back. The latter is done here, for forward and backward passes alike. It is what the others compute
too: products summed in fp32, rounded once.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

#: Operators of torch that multiply matrices, and how many of their first arguments are tensors.
_PRODUCTS = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3}

#: torch takes a replaced kernel back when its library object is gone.
_installed: list[torch.library.Library] = []


def slow_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit floats that this processor multiplies slowly."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, fast in supported.items() if not fast())


def install(dtypes: frozenset[torch.dtype]) -> None:
    """Has products of CPU tensors of these dtypes computed in fp32, for the life of the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # it is meant so
        for name, tensors in _PRODUCTS.items():
            for operator in (name, f"{name}.out"):
                product = _through_fp32(operator, tensors, dtypes)
                library.impl(operator, product, "CPU", with_keyset=True)
    _installed.append(library)


def _through_fp32(
    operator: str, tensors: int, dtypes: frozenset[torch.dtype]
) -> Callable[..., torch.Tensor]:
    original = torch.library.get_kernel(f"aten::{operator}", "CPU")

    def product(
        keys: Any, *args: Any, out: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        dtype = args[0].dtype
        if dtype not in dtypes or any(operand.dtype != dtype for operand in args[1:tensors]):
            if out is not None:
                kwargs["out"] = out
            return original.call_boxed(keys, *args, **kwargs)
        wide = [operand.float() for operand in args[:tensors]]
        if out is None:
            return original.call_boxed(keys, *wide, *args[tensors:], **kwargs).to(dtype)
        result = torch.empty(0)
        original.call_boxed(keys, *wide, *args[tensors:], **kwargs, out=result)
        return out.resize_(result.shape).copy_(result)

    return product
