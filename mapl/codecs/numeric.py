# SPDX-License-Identifier: Apache-2.0
"""The codec that sends each number as it is."""

import torch
from torch import Tensor

from mapl.codecs.base import Codec
from mapl.codecs.casting import check_dtype


class DtypeCodec(Codec):
    """Sends the numbers in their own dtype, bit for bit, NaN and inf included.

    Args:
        dtype: of the numbers at both ends.
        width: w, numbers a row.
    """

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        super().__init__()
        self.dtype, self.width = dtype, width

    def parts(self, rows: int) -> dict[str, int]:
        return {"latents": rows * self.width * self.dtype.itemsize}

    def encode(self, rows: Tensor, number: int) -> Tensor:
        """The rows' memory as uint8.

        Raises:
            ValueError: the rows have another dtype, so that sending them would round.
        """
        check_dtype(rows, self.dtype)
        return rows.detach().contiguous().flatten().view(torch.uint8)

    def encode_into(self, rows: Tensor, number: int, out: Tensor) -> None:
        """See `Codec` and `encode`."""
        check_dtype(rows, self.dtype)
        out.view(self.dtype).view(rows.shape).copy_(rows.detach())

    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        out.detach().copy_(body.view(self.dtype).view(out.shape))

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`: 0."""
        return torch.zeros_like(rows, dtype=torch.float64)
