# SPDX-License-Identifier: Apache-2.0
"""The codec that sends the largest numbers of each row and their places.

Top-k sparsification of activations and of their gradients, as Rudakov et al. (arXiv 2401.07788)
try it between model-parallel workers, here of each row (token) alone: x̂_j = x_j if |x_j| is among
the k largest of the row, else 0. What is left out is lost: error feedback would add it to the next
tensor, which is one of other tokens.

The body holds the values, [n, k] in the model's dtype, then their columns, uint16 [n, k], low byte
first, ascending in each row: k · (itemsize + 2) bytes a row, so that above k = w / 2 in 16 bits and
w · 2 / 3 in fp32 more is sent than by the codec `pipeline`.

Shapes: n rows, w numbers a row, k of them kept.
"""

import math

import torch
from torch import Tensor

from mapl.codecs.base import Codec
from mapl.codecs.bits import pack_bits, packed_bytes, unpack_bits
from mapl.codecs.casting import as_bytes, check_dtype

_INDEX_BITS = 16

#: Bytes of a number → the integers of its size, and integers that hold such a one and a column.
_KEYS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}


class TopKCodec(Codec):
    """Keeps the k numbers of largest magnitude of each row, bit for bit; all others decode to 0.

    Of equal magnitudes the one in the lower column is kept. A NaN is larger than all numbers, so
    that a row that holds a NaN or an inf arrives with one, where it was.

    Args:
        dtype: of the numbers at both ends, of 16 or 32 bits.
        width: w, at most 2¹⁶.
        kept: k, 1 … w.
    """

    def __init__(self, dtype: torch.dtype, width: int, kept: int) -> None:
        super().__init__()
        assert 1 <= kept <= width <= 1 << _INDEX_BITS, (kept, width)
        self.dtype, self.width, self.kept = dtype, width, kept
        self._integers, self._keys = _KEYS[dtype.itemsize]
        infinity = torch.tensor(math.inf, dtype=dtype, device="cpu")
        self._infinity_bits = int(infinity.view(self._integers))

    def parts(self, rows: int) -> dict[str, int]:
        """Values, then the columns where they stood."""
        count = rows * self.kept
        return {
            "latents": count * self.dtype.itemsize,
            "indices": packed_bytes(count, _INDEX_BITS),
        }

    @torch.no_grad()
    def encode(self, rows: Tensor, number: int) -> Tensor:
        """See `Codec`.

        Raises:
            ValueError: the rows have another dtype, so that sending them would round.
        """
        check_dtype(rows, self.dtype)
        columns = self._largest(rows)
        # As integers: moving a float may change the bits of a NaN.
        values = as_bytes(rows.view(self._integers).gather(1, columns))
        return torch.cat([values, pack_bits(columns.flatten(), _INDEX_BITS)])

    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        check_dtype(out, self.dtype)
        parts = self.split(body, len(out))
        values = parts["latents"].view(self._integers).view(-1, self.kept)
        columns = unpack_bits(parts["indices"], _INDEX_BITS, values.numel()).view(values.shape)
        # Bytes that were damaged on the way must not write beyond the row before that is noticed.
        columns = columns.clamp(max=self.width - 1).long()
        out.detach().view(self._integers).zero_().scatter_(1, columns, values)

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`: 0 where a number is kept, else |x|, at most the smallest |x| that is."""
        return rows.double().abs().scatter(1, self._largest(rows), 0.0)

    def _largest(self, rows: Tensor) -> Tensor:
        """The columns that are kept, int64 [n, k], ascending in each row."""
        # Without the sign, the bits of floats are integers in the order of their magnitudes. With
        # the column below them no two are equal, so that every device picks the same ones.
        magnitudes = rows.detach().view(self._integers) & torch.iinfo(self._integers).max
        magnitudes = magnitudes.clamp(max=self._infinity_bits + 1)  # no NaN above another
        backwards = torch.arange(self.width - 1, -1, -1, dtype=self._keys, device=rows.device)
        keys = (magnitudes.to(self._keys) << _INDEX_BITS) + backwards
        return keys.topk(self.kept, dim=1, sorted=False).indices.sort(dim=1).values
