# SPDX-License-Identifier: Apache-2.0
"""Sizes of grids and tiles: Triton's own functions for them take microseconds of the host."""


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
