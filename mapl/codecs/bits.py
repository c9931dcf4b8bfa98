# SPDX-License-Identifier: Apache-2.0
"""Packing of b-bit codes into bytes, lowest bit first: code i takes bits i·b … i·b + b − 1.

Bit k of the stream is bit k mod 8 of byte k // 8. The last byte is filled up with zeros.
"""

import torch
from torch import Tensor

MAX_BITS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take.

    Raises:
        ValueError: not 1 ≤ bits ≤ 16.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed; use 1 to {MAX_BITS}")
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The codes as bytes.

    Args:
        codes: [count] of an integer dtype, 0 ≤ code < 2^bits. That is not checked, since a check
            would wait for the device; a code out of range spoils its neighbours.
        bits: b, 1 … 16.

    Returns:
        uint8 [packed_bytes(count, bits)].

    Raises:
        ValueError: bits out of range.
    """
    total = packed_bytes(codes.numel(), bits)
    if bits == 8:
        return codes.to(torch.uint8)
    codes = codes.to(torch.int32)
    if bits == 16:
        return torch.stack([codes & 0xFF, codes >> 8], 1).to(torch.uint8).flatten()
    if bits == 4:
        pairs = _filled(codes, 2).view(-1, 2)
        return (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)
    stream = (codes[:, None] >> _places(bits, codes)) & 1
    octets = _filled(stream.flatten(), 8).view(total, 8)
    return (octets << _places(8, octets)).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The codes again, int32 [count].

    Args:
        data: uint8 [packed_bytes(count, bits)].
        bits: b, 1 … 16.
        count: how many codes were packed.

    Raises:
        ValueError: bits out of range, or data of another length.
    """
    if data.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{data.numel()} bytes do not hold {count} codes of {bits} bits, which take "
            f"{packed_bytes(count, bits)}"
        )
    data = data.to(torch.int32)
    if bits == 8:
        return data
    if bits == 16:
        pairs = data.view(-1, 2)
        return pairs[:, 0] | pairs[:, 1] << 8
    if bits == 4:
        return torch.stack([data & 15, data >> 4], 1).flatten()[:count]
    stream = ((data[:, None] >> _places(8, data)) & 1).flatten()
    digits = stream[: count * bits].view(count, bits)
    return (digits << _places(bits, digits)).sum(1).to(torch.int32)


def _filled(codes: Tensor, multiple: int) -> Tensor:
    """The codes with zeros behind them up to a multiple."""
    return torch.nn.functional.pad(codes, (0, -codes.numel() % multiple))


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.int32, device=like.device)
