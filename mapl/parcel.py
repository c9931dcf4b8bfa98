# SPDX-License-Identifier: Apache-2.0
"""What crosses a boundary once a step: flat data that several processes hold alike.

Tensor-parallel ranks and data-parallel replicas of a stage hold the same projector gradient and the
same codebooks. Each of them sends its share of the bytes to its peer on the other side, and the
other side gathers the shares on its own, fast network.
"""

from dataclasses import dataclass, replace

import torch

from mapl.channel import WHOLE, Share
from mapl.payload import WORD, PayloadLayout, pack
from mapl.payload_guard import PayloadGuard
from mapl.traffic import Ledger


@dataclass
class ParcelChannel:
    """One kind of once-a-step data of one boundary, seen from either end.

    Attributes:
        layout: boundary and direction.
        kind: what the ledger books the bytes as.
        share: which part this process sends.
        sent, received: how many parcels this end has packed and unpacked.
    """

    layout: PayloadLayout
    kind: str
    share: Share = WHOLE
    sent: int = 0
    received: int = 0

    def share_bytes(self, size: int) -> int:
        """Bytes of one share of `size` bytes: whole words, the last share padded."""
        return -(-size // (WORD * self.share.count)) * WORD

    def layout_of(self, size: int) -> PayloadLayout:
        """The layout of one share of `size` bytes."""
        return replace(self.layout, parts=((self.kind, self.share_bytes(size)),))

    def own(self, data: torch.Tensor) -> torch.Tensor:
        """This process's share of `data`, uint8, padded with zeros."""
        size = self.share_bytes(data.numel())
        share = data[self.share.index * size :][:size]
        return torch.nn.functional.pad(share, (0, size - share.numel()))

    def pack(self, data: torch.Tensor, ledger: Ledger) -> torch.Tensor:
        """The payload of this process's share of `data`, flat uint8; books its bytes."""
        layout = self.layout_of(data.numel())
        payload = pack(layout, self.sent, self.own(data))
        self.sent += 1
        unsplit = replace(layout, parts=((self.kind, data.numel()),)).total_bytes
        ledger.count(layout, uncompressed=0, unsplit=unsplit)
        return payload

    def unpack(self, payload: torch.Tensor, size: int, guard: PayloadGuard) -> torch.Tensor:
        """The peer's share of `size` bytes, as `own` would give it there.

        Raises:
            PayloadError: see `PayloadGuard.unpack`.
        """
        _, share = guard.unpack(self.layout_of(size), self.received, payload)
        self.received += 1
        return share
