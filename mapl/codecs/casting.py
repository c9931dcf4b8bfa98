# SPDX-License-Identifier: Apache-2.0
"""Casts for codecs: none turns a finite number into inf, none hides a number that is not finite.

Scales go over the wire as bf16. They are rounded here on the bit patterns, so that the CPU and
every GPU make the same bytes of them, those of a NaN included.
"""

import torch
from torch import Tensor

#: The smallest normal fp32 and bf16 number. A scale is never smaller, but for an exact 0: dividing
#: by a subnormal one could overflow.
SMALLEST_SCALE = 2.0**-126

_BF16_NAN = 0x7FC0
_BF16_MAX = 0x7F7F


def bf16_up(values: Tensor) -> Tensor:
    """The least bf16 number that is no smaller than each value.

    Args:
        values: fp32, not negative, at most the largest bf16 number; NaN and inf become NaN.
    """
    return _from_bits(values, (values.view(torch.int32) + 0xFFFF) >> 16)


def bf16_nearest(values: Tensor) -> Tensor:
    """The nearest finite bf16 number, ties to even.

    Args:
        values: fp32, not negative; NaN and inf become NaN.
    """
    bits = values.view(torch.int32)
    return _from_bits(values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def _from_bits(values: Tensor, upper: Tensor) -> Tensor:
    bits = torch.where(values.isfinite(), upper.clamp(max=_BF16_MAX), _BF16_NAN)
    return bits.to(torch.int16).view(torch.bfloat16)


def copy_clamped(values: Tensor, out: Tensor) -> None:
    """Copies fp32 `values` into `out`, which may be narrower.

    What lies outside the finite range of `out` becomes its largest number: rounding near the end of
    fp16's range would else make inf of a number that was finite before it was sent. NaN stays NaN.
    """
    limit = torch.finfo(out.dtype).max
    out.detach().copy_(values.clamp(-limit, limit))


def check_dtype(rows: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where numbers that cross as they are have another dtype than the codec."""
    if rows.dtype != dtype:
        raise ValueError(f"a tensor of {rows.dtype} was given to a codec for {dtype}")


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as flat uint8; a copy if it is not contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8)
