# SPDX-License-Identifier: Apache-2.0
"""Codecs that send a few bits a number and a scale for each group of numbers.

A row is cut into groups of `group_size` numbers; the last one is shorter if the row does not fill
it. With q_max the largest code,

    s = max |x| / q_max over the group, rounded up to bf16;  q = round(x / s);  x̂ = s · q.

Rounding s up keeps |q| ≤ q_max; s is no smaller than 2⁻¹²⁶. A group of zeros decodes to zeros. A
group that holds a NaN or an inf has s = NaN and decodes to NaN throughout, so that an overflow on
one side of a boundary is seen on the other. Other decoded numbers are clamped to the finite range
of the receiving dtype.

Shapes: n rows, w numbers a row.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mapl.codecs.base import Codec, Role
from mapl.codecs.bits import pack_bits, packed_bytes, unpack_bits
from mapl.codecs.casting import SMALLEST_SCALE, as_bytes, bf16_up, copy_clamped
from mapl.codecs.counter_random import signed, stream_key, uniform
from mapl.ops.dispatch import runs_gemms, use_triton
from mapl.ops.gathered import KERNEL_COLUMNS, has_kernels
from mapl.ops.gathered_operands import GatheredOperands

#: Rounding s up to the 8 significant bits of bf16 makes it larger by less than this factor; the
#: second one is for the fp32 rounding of max |x| / q_max.
_SCALE_SLACK = (1 + 2.0**-7) * (1 + 2.0**-20)


class ScaledCodec(Codec):
    """What the codecs of this file have in common.

    Args:
        role: what is carried.
        width: w.
        group_size: numbers that share a scale, at least 1.
        seed: of stochastic rounding; only the sending end uses it. Each sending process needs one
            of its own, or their errors would be alike and not average out.

    Raises:
        ValueError: group_size below 1.
    """

    bits: ClassVar[int]
    largest_code: float
    #: What the kernels call the format of a code, a key of `mapl.ops.kernels.quantise.LARGEST`.
    format: str
    #: Whether numbers are rounded up or down at random.
    stochastic = False

    def __init__(self, role: Role, width: int, group_size: int, seed: int) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(
                f"--mapl-codec-group-size {group_size} must be at least 1; 64 is usual"
            )
        self.role, self.width, self.seed = role, width, seed
        self.group_size = min(group_size, width)
        self.groups = -(-width // self.group_size)

    def parts(self, rows: int) -> dict[str, int]:
        """Scales, bf16 [n, groups], then the codes of all rows, padded to whole bytes once."""
        return {
            "scales": rows * self.groups * torch.bfloat16.itemsize,
            "latents": packed_bytes(rows * self.width, self.bits),
        }

    @torch.no_grad()
    def encode(self, rows: Tensor, number: int) -> Tensor:
        if use_triton(rows):
            body = rows.new_empty(self.body_bytes(len(rows)), dtype=torch.uint8)
            self.encode_into(rows, number, body)
            return body
        wide = rows.float()
        # Not divided: CUDA divides by a host number otherwise than the CPU.
        scales = bf16_up((self._group_max(wide) * (1 / self.largest_code)).clamp(SMALLEST_SCALE))
        # Codes beside a scale that is NaN mean nothing; 0 keeps the bytes the same everywhere.
        ratio = torch.nan_to_num(wide / self._spread(scales), nan=0.0)
        ratio.clamp_(-self.largest_code, self.largest_code)
        return torch.cat([as_bytes(scales), self._to_codes(ratio, number)])

    def encode_into(self, rows: Tensor, number: int, out: Tensor) -> None:
        if not use_triton(rows):
            super().encode_into(rows, number, out)
            return
        from mapl.ops.kernels import scaled

        key = signed(stream_key(self.seed, number))
        scaled.encode(rows, out, self.group_size, self.format, self.stochastic, key)

    def product_into(self, out: Tensor, number: int, operands: GatheredOperands) -> Tensor:
        left = operands.left
        fits = not self.stochastic and self.width <= KERNEL_COLUMNS
        if fits and has_kernels(left) and runs_gemms(left):
            from mapl.ops.kernels import gathered

            if gathered.quantises(self.width, self.group_size):
                operands = operands.row_contiguous()
                gathered.gathered_mm_quantised(operands, out, self.group_size, self.format)
                return left.new_empty(len(left), self.width)
        return super().product_into(out, number, operands)

    def product_from(
        self, bodies: Sequence[Tensor], number: int, operands: GatheredOperands
    ) -> Tensor:
        left, table, ids, weight = operands
        if has_kernels(left) and len(bodies) == 1:
            from mapl.ops.kernels.side_by_side import from_scaled

            group, format = self.group_size, self.format
            return torch.mm(from_scaled(bodies[0], left, table, ids, group, format), weight)
        return super().product_from(bodies, number, operands)

    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        if use_triton(out) and out.is_contiguous():
            from mapl.ops.kernels import scaled

            scaled.decode(body, out, self.group_size, self.format)
            return
        parts = self.split(body, out.shape[0])
        scales = parts["scales"].view(torch.bfloat16).view(-1, self.groups)
        values = self._from_codes(parts["latents"], out.numel()).view(-1, self.width)
        copy_clamped(values * self._spread(scales), out)

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`: half a step of the code, or a whole one where rounding is random."""
        wide = rows.double()
        scales = (self._group_max(wide) / self.largest_code * _SCALE_SLACK).clamp(
            min=SMALLEST_SCALE
        )
        return self._code_error(wide, self._spread(scales))

    def _to_codes(self, ratio: Tensor, number: int) -> Tensor:
        """x / s [n, w] fp32, |x / s| ≤ q_max, as the bytes of its codes; may change `ratio`."""
        raise NotImplementedError

    def _from_codes(self, data: Tensor, count: int) -> Tensor:
        """The numbers q, fp32 [count]."""
        raise NotImplementedError

    def _code_error(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Largest |s q − x|, all [n, w] fp64."""
        raise NotImplementedError

    def _group_max(self, rows: Tensor) -> Tensor:
        """max |x| of each group, [n, groups]; NaN or inf if the group holds one."""
        padded = F.pad(rows.abs(), (0, self.groups * self.group_size - self.width))
        return padded.reshape(-1, self.groups, self.group_size).amax(2)

    def _spread(self, scales: Tensor) -> Tensor:
        """The scale of each number, fp32 or wider [n, w], from that of each group [n, groups]."""
        wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
        spread = wide[:, :, None].expand(-1, -1, self.group_size)
        return spread.reshape(-1, self.groups * self.group_size)[:, : self.width]


class Fp8Codec(ScaledCodec):
    """Eight-bit floats, to the nearest: e4m3 for activations, e5m2 for gradients.

    |x̂ − x| ≤ 2⁻⁴ |x| + 2⁻¹⁰ s for e4m3 and 2⁻³ |x| + 2⁻¹⁷ s for e5m2: half a step of the last bit,
    and half the smallest float near zero.
    """

    bits = 8

    def __init__(self, role: Role, width: int, group_size: int, seed: int) -> None:
        super().__init__(role, width, group_size, seed)
        activation = role is Role.ACTIVATION
        self.float8 = torch.float8_e4m3fn if activation else torch.float8_e5m2
        self.largest_code = torch.finfo(self.float8).max
        self.format = "e4m3" if activation else "e5m2"

    def _to_codes(self, ratio: Tensor, number: int) -> Tensor:
        return as_bytes(ratio.to(self.float8))

    def _from_codes(self, data: Tensor, count: int) -> Tensor:
        return data.view(self.float8).float()

    def _code_error(self, rows: Tensor, scales: Tensor) -> Tensor:
        limits = torch.finfo(self.float8)
        # smallest_normal · eps is the smallest float above zero.
        near_zero = limits.smallest_normal * limits.eps / 2
        return (limits.eps / 2 * rows.abs() + near_zero * scales) * (1 + 2.0**-20)


class IntegerCodec(ScaledCodec):
    """Integers −q_max … q_max.

    Activations are rounded to the nearest, ties to even: |x̂ − x| ≤ s / 2. Gradients are rounded up
    or down at random, E[x̂] = x and |x̂ − x| < s: an error that repeats in each micro-batch would
    add up over a step, one without bias averages out. (A model in bf16 or fp16 then rounds x̂ to its
    dtype like any other number.) The random numbers are a hash of seed,
    payload number and place in the payload (mapl.codecs.counter_random). x / s itself is rounded to
    fp32, by less than 2⁻¹⁶.
    """

    def __init__(self, role: Role, width: int, group_size: int, seed: int) -> None:
        super().__init__(role, width, group_size, seed)
        self.stochastic = role is Role.GRADIENT

    def _to_codes(self, ratio: Tensor, number: int) -> Tensor:
        if self.stochastic:
            below = ratio.floor()
            key = stream_key(self.seed, number)
            chance = uniform(key, ratio.numel(), ratio.device).view(ratio.shape)
            # The same law as ⌊x/s + u⌋; but that sum would round, for it has more bits than fp32.
            ratio = below + (chance < ratio - below)
        else:
            ratio = ratio.round()
        return self._pack(ratio.flatten())

    def _pack(self, integers: Tensor) -> Tensor:
        """Whole fp32 numbers [count] as bytes."""
        raise NotImplementedError

    def _code_error(self, rows: Tensor, scales: Tensor) -> Tensor:
        steps = 1.0 if self.stochastic else 0.5
        return (steps + 2.0**-16) * scales


class Int8Codec(IntegerCodec):
    """One byte a number, −127 … 127 in two's complement. See `IntegerCodec`."""

    bits = 8
    largest_code = 127.0
    format = "int8"

    def _pack(self, integers: Tensor) -> Tensor:
        return integers.to(torch.int8).view(torch.uint8)

    def _from_codes(self, data: Tensor, count: int) -> Tensor:
        return data.view(torch.int8).float()


class Int4Codec(IntegerCodec):
    """Half a byte a number: −7 … 7, sent as 1 … 15. See `IntegerCodec`.

    The numbers of all rows follow each other; if their count is odd, four zero bits close the body.
    """

    bits = 4
    largest_code = 7.0
    format = "int4"

    def _pack(self, integers: Tensor) -> Tensor:
        return pack_bits(integers.to(torch.int32) + 8, self.bits)

    def _from_codes(self, data: Tensor, count: int) -> Tensor:
        return (unpack_bits(data, self.bits, count) - 8).float()
