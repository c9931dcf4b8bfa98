# SPDX-License-Identifier: Apache-2.0
"""Random numbers without a state: a hash of (key, index), alike on every device.

The hash is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), whose i-th output depends on nothing but key and i. torch's int64 arithmetic wraps, as the
algorithm asks for; only right shifts need a mask, since torch's repeat the sign.
"""

import torch
from torch import Tensor

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15
#: (bits shifted, factor) of each round of the mixing function; the last has no factor.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))


def stream_key(*words: int) -> int:
    """A 64-bit key of several integers, such as a seed and a payload number; order matters."""
    key = 0
    for word in words:
        key = (key + _GAMMA + word) % _WORD
        for shift, factor in _ROUNDS:
            key ^= key >> shift
            if factor is not None:
                key = key * factor % _WORD
    return key


def hash64(key: int, count: int, device: torch.device) -> Tensor:
    """The first `count` outputs of SplitMix64 with state `key`, as int64 [count]."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    x.mul_(signed(_GAMMA)).add_(signed(key))
    for shift, factor in _ROUNDS:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            x.mul_(signed(factor))
    return x


def uniform(key: int, count: int, device: torch.device) -> Tensor:
    """`count` multiples of 2⁻²⁴ in [0, 1), fp32 [count].

    Numbers 2 i and 2 i + 1 come from the upper 24 bits of the low and the high half of hash i.
    """
    halves = hash64(key, -(-count // 2), device).view(torch.int32)[:count]
    return ((halves >> 8) & 0xFFFFFF).float().mul_(2.0**-24)


def gaussian(key: int, count: int, device: torch.device) -> Tensor:
    """`count` numbers of mean 0 and variance 1, nearly normal within ±4.8, fp32 [count].

    Number i is the sum of the eight bytes of hash i, centred and scaled. A logarithm and a cosine
    would differ in the last bit between one kind of processor and another.
    """
    total = hash64(key, count, device).view(torch.uint8).view(count, 8).sum(1)
    return (total - 8 * 255 // 2).float().mul_((8 * (256**2 - 1) / 12) ** -0.5)


def signed(word: int) -> int:
    """The int64 of the same bits."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
