# SPDX-License-Identifier: Apache-2.0
"""One direction of one boundary, seen from either end: codec, frame, sequence number, bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from mapl.codecs import Codec
from mapl.payload import PayloadLayout, blank, body_of, seal
from mapl.payload_guard import PayloadGuard
from mapl.traffic import Ledger


@dataclass(frozen=True)
class Share:
    """Which part of what `count` processes hold alike this one sends: the `index`-th of `count`."""

    index: int
    count: int


#: This process alone holds what it sends.
WHOLE = Share(0, 1)

#: A training run has few sizes of micro-batches; no more layouts than this are kept.
_LAYOUTS = 16


@dataclass
class Channel:
    """Both ends build the same channel, so they agree on every size without asking.

    Attributes:
        layout: boundary, direction and vocabulary; its sizes are set for each micro-batch shape.
        width: numbers a token has on the wire.
        codec: how they become bytes.
        carries_ids: whether token ids go along.
        share: which part of the tokens this process sends. Their number is a multiple of
            `share.count`.
        sent, received: how many payloads this end has packed and unpacked. The header carries the
            sender's count, so that a payload that was lost or doubled is seen.
    """

    layout: PayloadLayout
    width: int
    codec: Codec
    carries_ids: bool
    share: Share = WHOLE
    sent: int = 0
    received: int = 0
    _layouts: dict[tuple[PayloadLayout, int], PayloadLayout] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def layout_of(self, tokens: Sequence[int]) -> PayloadLayout:
        """The layout of this process's part of a micro-batch of token shape `tokens` = (s, b)."""
        return self._layout(tokens[0] * tokens[1] // self.share.count)

    def _layout(self, rows: int) -> PayloadLayout:
        key = self.layout, rows
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) == _LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = replace(
                self.layout,
                parts=tuple(self.codec.parts(rows).items()),
                id_count=rows if self.carries_ids else 0,
            )
        return layout

    def pack(
        self, tensor: torch.Tensor, ids: torch.Tensor | None, ledger: Ledger, uncompressed: int
    ) -> torch.Tensor:
        """The payload of this process's part of `tensor` [s, b, width] and `ids` [s, b].

        Its bytes are booked in `ledger`.

        Args:
            uncompressed: bytes that plain Megatron would have sent for this micro-batch.
        """
        rows = tensor.detach().reshape(-1, self.width)

        def fill(body: torch.Tensor) -> None:
            self.codec.encode_into(self._own(rows), self.sent, body)

        return self.pack_body(fill, tensor.shape[:2], tensor.device, ids, ledger, uncompressed)

    def pack_body(
        self,
        fill: Callable[[torch.Tensor], None],
        tokens: Sequence[int],
        device: torch.device,
        ids: torch.Tensor | None,
        ledger: Ledger,
        uncompressed: int,
    ) -> torch.Tensor:
        """The same where `fill` writes the body, uint8, of tokens of shape (s, b)."""
        layout = self.layout_of(tokens)
        payload = blank(layout, device)
        fill(body_of(layout, payload))
        carried = None
        if self.carries_ids:
            assert ids is not None, "a channel that carries ids was given none"
            carried = self._own(ids.flatten())
        seal(layout, self.sent, payload, carried)
        self.sent += 1
        whole = layout if self.share.count == 1 else self._layout(tokens[0] * tokens[1])
        ledger.count(layout, uncompressed=uncompressed, unsplit=whole.total_bytes)
        return payload

    def unpack(
        self, payloads: Sequence[torch.Tensor], out: torch.Tensor, guard: PayloadGuard
    ) -> torch.Tensor | None:
        """Fills `out` [s, b, width] from the payloads of all shares; the ids [s, b] if any.

        Raises:
            PayloadError: see `PayloadGuard.unpack`.
        """
        bodies, ids = self.check(payloads, out.shape[:2], guard)
        self.codec.decode(bodies, out.detach().view(-1, self.width), self.received - 1)
        return ids

    def check(
        self, payloads: Sequence[torch.Tensor], tokens: Sequence[int], guard: PayloadGuard
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The bodies of all shares of one micro-batch, still encoded, and the ids [s, b] if any.

        Raises:
            PayloadError: see `PayloadGuard.unpack`.
        """
        layout = self.layout_of(tokens)
        pieces = [guard.unpack(layout, self.received, payload) for payload in payloads]
        self.received += 1
        bodies = [body for _, body in pieces]
        ids = [part for part, _ in pieces if part is not None]
        if not ids:
            return bodies, None
        return bodies, (ids[0] if len(ids) == 1 else torch.cat(ids)).view(*tokens)

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        share = self.share
        return rows if share.count == 1 else rows.chunk(share.count)[share.index]
