# SPDX-License-Identifier: Apache-2.0
"""What a wire codec is: sizes known beforehand, encode, decode.

A codec turns the rows of a tensor into the body of a payload, and back. Autograd ends at a pipeline
boundary anyway, so a codec is a plain function of tensors. Each direction of each boundary has a
codec of its own, one on either end, built alike.

Shapes: n rows (tokens) of a payload, w numbers a row.
"""

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mapl.ops.gathered import gathered_mm
from mapl.ops.gathered_operands import GatheredOperands


class Role(enum.Enum):
    """What a codec carries; gradients need an estimate without bias more than activations do."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


class Codec(nn.Module):
    """Base of all codecs; a module, since some have state that moves and is saved with the model.

    Bytes of a kind that `parts` names are booked under that name: "latents" for what stands for the
    numbers themselves, "indices" for where they belong, "scales" and "codebook" for what is needed
    to read them.
    """

    def parts(self, rows: int) -> dict[str, int]:
        """Kind → bytes of the body of a payload of `rows` rows, in wire order.

        Both ends call this to know a size without asking.
        """
        raise NotImplementedError

    def body_bytes(self, rows: int) -> int:
        """Bytes of the whole body."""
        return sum(self.parts(rows).values())

    def encode(self, rows: Tensor, number: int) -> Tensor:
        """The bytes of `rows`.

        Args:
            rows: [n, w] in the model's dtype; not changed.
            number: of the payload in its channel, from 0, the same as at the other end.

        Returns:
            uint8 [body_bytes(n)] on the device of `rows`; may be a view of its memory.
        """
        raise NotImplementedError

    def encode_into(self, rows: Tensor, number: int, out: Tensor) -> None:
        """Fills `out`, uint8 [body_bytes(n)] on the device of `rows`, with what `encode` gives.

        A payload is made this way. A codec that can write straight into it overrides this.
        """
        out.copy_(self.encode(rows, number))

    def decode(self, bodies: Sequence[Tensor], out: Tensor, number: int) -> None:
        """Fills `out` with what was encoded.

        Args:
            bodies: uint8, one body from each process that sent a part of the rows, in order; parts
                are equally long.
            out: [n, w] in the model's dtype, filled in place.
            number: as for `encode`.
        """
        shares = out.chunk(len(bodies)) if len(bodies) > 1 else (out,)
        for body, rows in zip(bodies, shares, strict=True):
            self.decode_rows(body, rows)

    def product_into(self, out: Tensor, number: int, operands: GatheredOperands) -> Tensor:
        """Fills `out` with the bytes of Z, the product that `mapl.ops.gathered.gathered_mm` gives.

        Args:
            out, number: as for `encode_into`.
            operands: as for `gathered_mm`.

        Returns:
            A tensor of Z's shape. A codec that makes bytes of Z while it is still in registers
            leaves its numbers undefined.
        """
        z = gathered_mm(operands)
        self.encode_into(z, number, out)
        return z

    def product_from(
        self, bodies: Sequence[Tensor], number: int, operands: GatheredOperands
    ) -> Tensor:
        """Fills left with the Ẑ of these bodies and gives the product of `gathered_mm` with it.

        Args:
            bodies, number: as for `decode`.
            operands: as for `gathered_mm`; left [n, w] contiguous.
        """
        self.decode(bodies, operands.left, number)
        return gathered_mm(operands)

    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        """Fills `out` [n, w] with one body."""
        raise NotImplementedError

    def error_bound(self, rows: Tensor) -> Tensor:
        """How far each decoded number can be from the one sent, before out's dtype rounds it.

        Args:
            rows: [n, w], finite.

        Returns:
            [n, w] fp64.
        """
        raise NotImplementedError

    def split(self, body: Tensor, rows: int) -> dict[str, Tensor]:
        """Kind → its bytes, as views of `body`."""
        parts = self.parts(rows)
        pieces = torch.split(body, list(parts.values()))
        return dict(zip(parts, pieces, strict=True))
