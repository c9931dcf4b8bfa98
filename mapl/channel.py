# SPDX-License-Identifier: Apache-2.0
"""One direction of one boundary, seen from either end: codec, frame, sequence number, bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mapl.codecs import Codec
from mapl.payload import PayloadGuard, PayloadLayout, pack
from mapl.traffic import Ledger


@dataclass
class Channel:
    """Both ends build the same channel, so they agree on every size without asking.

    Attributes:
        layout: boundary, direction and id size; its sizes are set for each micro-batch shape.
        width: numbers a token has on the wire.
        codec: how they become bytes.
        carries_ids: whether token ids go along.
        sent, received: how many payloads this end has packed and unpacked. The header carries the
            sender's count, so that a payload that was lost or doubled is seen.
    """

    layout: PayloadLayout
    width: int
    codec: Codec
    carries_ids: bool
    sent: int = 0
    received: int = 0

    def layout_of(self, tokens: Sequence[int]) -> PayloadLayout:
        """The layout of a micro-batch of token shape `tokens` = (s, b)."""
        return replace(
            self.layout,
            body_bytes=self.codec.body_bytes((*tokens, self.width)),
            id_count=tokens[0] * tokens[1] if self.carries_ids else 0,
        )

    def pack(
        self, tensor: torch.Tensor, ids: torch.Tensor | None, ledger: Ledger, uncompressed: int
    ) -> torch.Tensor:
        """The payload of `tensor` [s, b, width] and `ids` [s, b]; books its bytes.

        Args:
            uncompressed: bytes that plain Megatron would have sent for this micro-batch.
        """
        layout = self.layout_of(tensor.shape[:2])
        body = self.codec.encode(tensor)
        payload = pack(layout, self.sent, body, ids if self.carries_ids else None)
        self.sent += 1
        ledger.count(layout, uncompressed=uncompressed)
        return payload

    def unpack(
        self, payload: torch.Tensor, out: torch.Tensor, guard: PayloadGuard
    ) -> torch.Tensor | None:
        """Fills `out` [s, b, width] from `payload`; the ids [s, b] if there are any.

        Raises:
            PayloadError: see `PayloadGuard.unpack`.
        """
        layout = self.layout_of(out.shape[:2])
        ids, body = guard.unpack(layout, self.received, payload)
        self.received += 1
        self.codec.decode(body, out)
        return None if ids is None else ids.view(out.shape[:2])
