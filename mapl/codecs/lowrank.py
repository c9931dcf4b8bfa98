# SPDX-License-Identifier: Apache-2.0
"""The codec that sends gradients as products of two thin matrices and makes good what it left out.

Method: the compressed backpropagation of Optimus-CC (Song et al., arXiv 2301.09830), which applies
PowerSGD (Vogels et al., arXiv 1905.13727) to what crosses a boundary backward. For the gradient
G [n, w] of a micro-batch, with the error E and the matrix Q [w, q] that the one before it left:

1. M = G + E
2. P = orthonormal columns that span those of M Q
3. Q ← Mᵀ P, which is sent with P; the receiver forms Ĝ = P Qᵀ
4. E ← M − Ĝ, of the very numbers that the receiver gets

So Q takes one step of a power iteration with each payload, and all that was decoded, and the last
error, add up to all gradients. The error is that of tokens of another micro-batch: what it adds to
dX is meant for the sum over the micro-batches that makes the gradient of a weight ("lazy error
propagation").

What is known of the original, from its abstract and its published code: one error and one Q for
each process, an error that is added to the next gradient that is sent compressed and that is never
cleared nor saved, not even where the weights change between two steps; and its own runs compress
only the gradients that the pipeline waits for at the end of a step. Decided here:

- The gradient of every micro-batch is compressed, as by any codec.
- The error ends with the step. The weights that its gradient belonged to are gone then, with fp16
  perhaps the loss scale too; and a checkpoint, which is written between steps, need not hold an
  error for each process.
- At the end of a step all processes that hold the same stage go on with the Q of the first of
  them, so that a checkpoint holds one, and a resumed job continues bit for bit.
- An M of zeros leaves Q as it is.

Each process that sends other rows (a replica, or a tensor-parallel rank that sends its part of a
micro-batch) has an error of the shape of its own rows, and within a step a Q of its own.

The body holds c P, [n, q], then Q / c, [w, q], both in the model's dtype. c is the least power of
two that is no smaller than √n. That keeps Q / c within the range of M, which Q itself, up to √n
times larger, would leave in fp16; the product is the same. q (n + w) numbers are sent for n w.

Shapes: n rows of a payload, w numbers a row, q columns.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from mapl.codecs.base import Codec
from mapl.codecs.casting import SMALLEST_SCALE, check_dtype, copy_clamped
from mapl.codecs.counter_random import gaussian
from mapl.codecs.settings import CodecSettings, check_lowrank
from mapl.fp32 import full_precision, keep_dtype

#: More than what roundings to a 16-bit dtype and fp32 arithmetic can add to a product.
_ROUNDING = 1.05


class LowRankCodec(Codec):
    """One end of the backward direction; both ends are built alike but for `sends`.

    A row that holds a NaN or an inf decodes to NaN throughout and leaves no error; the other rows
    are sent as if it were zero. Decoded numbers are clamped to the finite range of the dtype.
    Nothing here is random but the first Q. All arithmetic is in fp32, and alike on one kind of
    device only: a factorisation rounds otherwise on another.

    Args:
        dtype: of the numbers at both ends.
        width: w.
        settings: its `lowrank_q` is q.
        seed: of the first Q, the same in all processes.
        sends: whether this end encodes or decodes.

    Attributes:
        Q: [w, q] fp32 buffer of the sender, up to a factor what was sent last; M Q depends on no
            factor but for its own. Stays fp32 in a model of any dtype.
        error: E [n, w] fp32 of the sender, or None at the start of a step; not saved.

    Raises:
        ValueError: see `mapl.codecs.settings.check_lowrank`.
    """

    Q: Tensor
    error: Tensor | None

    def __init__(
        self,
        dtype: torch.dtype,
        width: int,
        settings: CodecSettings,
        seed: int,
        *,
        sends: bool = True,
    ) -> None:
        super().__init__()
        self.dtype, self.width, self.settings, self.sends = dtype, width, settings, sends
        self.columns = check_lowrank(settings, width=width)
        self.register_buffer("error", None, persistent=False)
        if sends:
            start = gaussian(seed, width * self.columns, torch.device("cpu"))
            self.register_buffer("Q", start.view(width, self.columns))

    def parts(self, rows: int) -> dict[str, int]:
        """P and Q, together.

        Raises:
            ValueError: there are fewer rows than columns.
        """
        check_lowrank(self.settings, width=self.width, rows=rows)
        return {"latents": (rows + self.width) * self.columns * self.dtype.itemsize}

    @torch.no_grad()
    def encode(self, rows: Tensor, number: int) -> Tensor:
        """See `Codec`. The next call adds what this one left out, if it has as many rows.

        Raises:
            RuntimeError: this end does not send.
            ValueError: the rows have another dtype, or are fewer than the columns.
        """
        if not self.sends:
            raise RuntimeError("the receiving end of lowrank cannot encode: it has no error")
        check_dtype(rows, self.dtype)
        size = self.body_bytes(len(rows))
        total = self._with_error(rows)
        finite = total.isfinite().all(1, keepdim=True)
        total = total.where(finite, 0.0)
        left, right = self._factors(total)
        left = left.where(finite, math.nan)
        body = torch.empty(size, dtype=torch.uint8, device=rows.device)
        copy_clamped(torch.cat([left, right]).flatten(), body.view(self.dtype))
        decoded = torch.empty(rows.shape, dtype=self.dtype, device=rows.device)
        self.decode_rows(body, decoded)
        self.error = (total - decoded.float()).where(finite, 0.0)
        return body

    @torch.no_grad()
    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        check_dtype(out, self.dtype)
        rows = len(out)
        left, right = body.view(self.dtype).view(-1, self.columns).float().split([rows, self.width])
        factor = _factor(rows)
        # The factor comes last, so that only what is itself out of range gets there.
        with full_precision(out.device):
            copy_clamped((left / factor) @ right.t() * factor, out)

    def end_step(self) -> None:
        """Forgets the error: the next payload belongs to other weights."""
        self.error = None

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`: |G| + the norm of M's column, which |Ĝ| cannot exceed, as P is orthonormal.

        So this holds for any gradient; how well one of low rank does is a matter of the data.
        """
        norms = self._with_error(rows).double().norm(dim=0)
        limits = torch.finfo(self.dtype)
        smallest = limits.smallest_normal * limits.eps
        floor = self.columns * _factor(len(rows)) * smallest
        bound: Tensor = rows.double().abs() + norms * _ROUNDING + floor
        return bound

    def _with_error(self, rows: Tensor) -> Tensor:
        """M [n, w] fp32."""
        # A product of a transposed matrix may round otherwise.
        total = rows.detach().float().contiguous()
        if self.error is None or self.error.shape != total.shape:
            return total
        return total + self.error

    def _factors(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """c P [n, q] and Q / c [w, q] of a finite M [n, w], fp32; moves `Q`."""
        largest = total.abs().amax()
        scale = largest.clamp(min=SMALLEST_SCALE)  # so that no product overflows
        scaled = total / scale
        factor = _factor(len(total))
        with full_precision(total.device):
            # Householder's reflections: columns that depend on others, zeros even, become
            # orthonormal ones too.
            left = torch.linalg.qr(scaled @ self.Q).Q
            right = scaled.t() @ left
        self.Q.copy_(right.where(largest > 0, self.Q))
        return left * factor, right / factor * scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtype(fn), recurse)
        return self


def _factor(rows: int) -> float:
    """c, the least power of two that is no smaller than √n."""
    return 2.0 ** math.ceil(math.log2(rows) / 2)
