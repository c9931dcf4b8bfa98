# SPDX-License-Identifier: Apache-2.0
"""The codec that sends each number as it is."""

import torch
from torch import Tensor

from mapl.codecs.base import Codec


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
        self._check_dtype(rows)
        return rows.detach().contiguous().flatten().view(torch.uint8)

    def encode_into(self, rows: Tensor, number: int, out: Tensor) -> None:
        """See `Codec` and `encode`."""
        self._check_dtype(rows)
        out.view(self.dtype).view(rows.shape).copy_(rows.detach())

    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        out.detach().copy_(body.view(self.dtype).view(out.shape))

    def _check_dtype(self, rows: Tensor) -> None:
        if rows.dtype != self.dtype:
            raise ValueError(f"a tensor of {rows.dtype} was given to a codec for {self.dtype}")

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`: 0."""
        return torch.zeros_like(rows, dtype=torch.float64)
