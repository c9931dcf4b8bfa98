# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of mapl.codecs.scaled inside a kernel: what becomes of numbers held in registers.

    s = scale_bits(max over the group of magnitude(x));  c = code(ratio(x, s));  x̂ = s · value(c)

Any kernel that holds whole groups may call these, in a GEMM's epilogue too, and gives the bytes of
the reference: all is integer arithmetic on bit patterns, or single fp32 operations rounded as IEEE
754 says, with no product whose sum a compiler could contract. Nothing depends on how a GPU casts to
eight bits, so old GPUs without fp8 and the interpreter agree with new ones.

FORMAT is one of the names in `LARGEST`; "int4" codes are nibbles 1 … 15.
"""

import triton
import triton.language as tl

#: q_max of each format.
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 7.0}

_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST_SCALE = tl.constexpr(0x00800000)  # 2⁻¹²⁶
_BF16_NAN = tl.constexpr(0x7FC0)
_BF16_MAX = tl.constexpr(0x7F7F)
#: 1.5 · 2²³: the sum of it and a small number is that number rounded to the nearest, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def magnitude(x):
    """|x| of fp32 as int32 whose order is that of the numbers, any NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bf16_nearest_bits(x):
    """fp32, not negative → int32, the bits of the nearest finite bf16; NaN of NaN and inf."""
    bits = x.to(tl.int32, bitcast=True)
    upper = tl.minimum((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, _BF16_MAX)
    return tl.where((bits & 0x7FFFFFFF) >= _INFINITY, _BF16_NAN, upper)


@triton.jit
def scale_bits(largest, LARGEST: tl.constexpr):
    """s of groups whose largest `magnitude` is given, int32: the bits of a bf16 number.

    LARGEST is q_max. NaN if the group holds a NaN or an inf; else from 2⁻¹²⁶ up.
    """
    exact = largest.to(tl.float32, bitcast=True) * (1.0 / LARGEST)
    bits = tl.maximum(exact.to(tl.int32, bitcast=True), _SMALLEST_SCALE)
    upper = tl.minimum((bits + 0xFFFF) >> 16, _BF16_MAX)
    return tl.where(largest >= _INFINITY, _BF16_NAN, upper)


@triton.jit
def from_bf16_bits(bits):
    """int32 (the upper half does not matter) → the fp32 of the same value."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def ratio(x, scale, LARGEST: tl.constexpr):
    """x / s of fp32 numbers, |x / s| ≤ q_max; 0 where s is NaN."""
    quotient = tl.div_rn(x, scale)
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    return clamped(quotient, LARGEST)


@triton.jit
def clamped(x, LIMIT: tl.constexpr):
    """x within ±LIMIT; NaN stays NaN."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def code(ratio, chance, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The code of x / s, int32 with 8 meaningful bits (4 for int4) and zeros above.

    Args:
        ratio: fp32, what `ratio` gives.
        chance: fp32 in [0, 1), what `chance_low` or `chance_high` give; read if STOCHASTIC, which
            the integer formats alone know.
    """
    if FORMAT == "e4m3":
        bits = _float8(ratio, 3, 7)
    elif FORMAT == "e5m2":
        bits = _float8(ratio, 2, 15)
    else:
        if STOCHASTIC:
            # A GPU takes a subnormal for 0 here. Below zero that makes 0 of −1, and the draw then
            # gives 0 too, as it always does one step above −1.
            below = tl.floor(ratio)
            whole = below.to(tl.int32) + (chance < ratio - below).to(tl.int32)
        else:
            whole = (ratio + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
        if FORMAT == "int4":
            bits = whole + 8
        else:
            bits = whole & 0xFF
    return bits


@triton.jit
def code_pairs(even, odd, pair, key, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The codes of x / s at places 2 · pair and 2 · pair + 1, as `code` gives them.

    Args:
        even, odd: fp32, what `ratio` gives.
        pair: which pair of the payload each is, in the order of the places.
        key: int64, of the random numbers; read if STOCHASTIC.
    """
    if STOCHASTIC:
        hash = hash64(key, pair)
        low = code(even, chance_low(hash), FORMAT, True)
        high = code(odd, chance_high(hash), FORMAT, True)
    else:
        low = code(even, even, FORMAT, False)
        high = code(odd, odd, FORMAT, False)
    return low, high


@triton.jit
def value(code, FORMAT: tl.constexpr):
    """The fp32 number q of a code (int32, zeros above its bits)."""
    if FORMAT == "e4m3":
        # The exponent's bias goes from 7 to 127 by a product, which is right for subnormals too.
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
        q = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
    elif FORMAT == "e5m2":  # the upper byte of an fp16 number
        q = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "int8":
        q = ((code << 24) >> 24).to(tl.float32)
    else:
        q = (code - 8).to(tl.float32)
    return q


@triton.jit
def _float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The nearest float of 8 bits, ties to even, of fp32 numbers within its finite range."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    cut: tl.constexpr = 23 - MANTISSA
    # Adding a number whose last bit is the smallest subnormal rounds to a multiple of that.
    unit: tl.constexpr = (127 - BIAS + cut + 1) << 23
    unit_bits = tl.full(bits.shape, unit, tl.int32)
    small = bits.to(tl.float32, bitcast=True) + unit_bits.to(tl.float32, bitcast=True)
    subnormal = small.to(tl.int32, bitcast=True) - unit
    rounded = bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)
    normal = (rounded - ((127 - BIAS) << 23)) >> cut
    return sign | tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)


@triton.jit
def hash64(key, index):
    """Output `index` (from 0) of SplitMix64 with state `key`, uint64: see counter_random."""
    x = (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def chance_low(hash):
    """The random number of place 2 i, from `hash64` i: a multiple of 2⁻²⁴ in [0, 1)."""
    return ((hash >> 8) & 0xFFFFFF).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def chance_high(hash):
    """The random number of place 2 i + 1, from `hash64` i."""
    return (hash >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
