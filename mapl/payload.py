# SPDX-License-Identifier: Apache-2.0
"""The frame of what crosses a boundary: one flat uint8 tensor, checked on arrival.

    header | token ids | body | checksum

- header: four little-endian int64 words: magic and format version; boundary and direction; sequence
  number of the payload at this boundary and direction, from 0; total bytes.
- token ids and body: each padded with zeros to a multiple of 8 bytes. An id takes the low 1, 2, 3
  or 4 bytes of an int32, as few as hold the vocabulary. A size that a layout names is known to both
  sides, so no header is read to find out what to receive.
- checksum: one int64, the sum over all words before it of word_i · (2 i + 1) modulo 2^64. The odd
  weights make it change with any single word and with any swap of unequal words whose distance is
  not a multiple of a high power of two; being a plain sum it runs in parallel on any device.

What arrives is checked by payload_guard.py.
"""

import enum
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from mapl.ops import use_triton
from mapl.token_ids import id_size, pack_ids

MAGIC = int.from_bytes(b"MAPL", "little")
FORMAT_VERSION = 1
WORD = 8
HEADER_WORDS = 4
_SEQUENCE = 2  # the header's word that changes from payload to payload


class Direction(enum.IntEnum):
    """What a payload is: an activation, its gradient, or, once a step, the projector's gradient.

    The last two are whole codebooks, of activations and of gradients.
    """

    FORWARD = 0
    BACKWARD = 1
    PROJECTOR = 2
    FORWARD_CODEBOOK = 3
    BACKWARD_CODEBOOK = 4


@dataclass(frozen=True)
class PayloadLayout:
    """The sizes of one payload, the same on both sides of the boundary.

    Attributes:
        boundary, direction: where it crosses.
        parts: (kind, bytes) of what the body is made of, in order.
        id_count: how many token ids it carries.
        vocab_size: they are less than this.
    """

    boundary: int
    direction: Direction
    parts: tuple[tuple[str, int], ...] = ()
    id_count: int = 0
    vocab_size: int = 1

    @cached_property
    def body_bytes(self) -> int:
        """Bytes of the body, without padding."""
        return sum(size for _, size in self.parts)

    @cached_property
    def id_size(self) -> int:
        """Bytes of one token id."""
        return id_size(self.vocab_size)

    @cached_property
    def id_bytes(self) -> int:
        """Bytes of the token ids, without padding."""
        return self.id_count * self.id_size

    @cached_property
    def body_start(self) -> int:
        """Where the body starts in the payload, in bytes."""
        return (HEADER_WORDS + words(self.id_bytes)) * WORD

    @cached_property
    def padding(self) -> int:
        """Bytes between the body and the checksum."""
        return -self.body_bytes % WORD

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of the whole payload."""
        return self.body_start + self.body_bytes + self.padding + WORD

    @property
    def frame_bytes(self) -> int:
        """Bytes of the header, the padding and the checksum."""
        return self.total_bytes - self.id_bytes - self.body_bytes

    def header(self, sequence: int) -> list[int]:
        """The four words that the payload starts with."""
        return [
            MAGIC | FORMAT_VERSION << 32,
            self.boundary << 8 | int(self.direction),
            sequence,
            self.total_bytes,
        ]


def pack(
    layout: PayloadLayout, sequence: int, body: torch.Tensor, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Frames `body` (uint8 [body_bytes]) and `ids` (integers, `id_count` of them).

    Returns:
        uint8 [layout.total_bytes] on the body's device.

    Raises:
        ValueError: body or ids have another size than the layout says.
    """
    if body.dtype != torch.uint8 or body.numel() != layout.body_bytes:
        raise ValueError(
            f"a body of {body.numel()} {body.dtype} does not fit the layout's "
            f"{layout.body_bytes} bytes"
        )
    payload = blank(layout, body.device)
    body_of(layout, payload).copy_(body)
    seal(layout, sequence, payload, ids)
    return payload


def blank(layout: PayloadLayout, device: torch.device) -> torch.Tensor:
    """A payload to be filled, uint8 [layout.total_bytes]: write the body, then `seal` it."""
    return torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)


def body_of(layout: PayloadLayout, payload: torch.Tensor) -> torch.Tensor:
    """The body, uint8 [body_bytes], as a view of the payload."""
    return payload[layout.body_start : layout.body_start + layout.body_bytes]


def seal(
    layout: PayloadLayout, sequence: int, payload: torch.Tensor, ids: torch.Tensor | None = None
) -> None:
    """Puts header, ids, padding and checksum around the body of a payload that `blank` gave.

    Args:
        ids: integers, `id_count` of them; None if there are none.

    Raises:
        ValueError: there are more or fewer ids.
    """
    count = 0 if ids is None else ids.numel()
    if count != layout.id_count:
        raise ValueError(f"{count} token ids do not fit the layout's {layout.id_count}")
    if use_triton(payload):
        from mapl.ops.kernels import payload as kernels

        kernels.seal(layout.header(sequence), payload, ids, layout.id_size, layout.padding)
        return
    payload[layout.total_bytes - WORD - layout.padding : layout.total_bytes - WORD] = 0
    content = payload.view(torch.int64)
    content[:HEADER_WORDS] = header_on(layout, sequence, payload.device)
    if ids is not None:
        start = HEADER_WORDS * WORD
        content[HEADER_WORDS : HEADER_WORDS + words(layout.id_bytes)] = 0
        payload[start : start + layout.id_bytes] = pack_ids(ids, layout.id_size)
    content[-1] = checksum(content[:-1])


def checksum(content: torch.Tensor) -> torch.Tensor:
    """Σ word_i · (2 i + 1) modulo 2^64 of an int64 vector, as a 0-dim int64 tensor."""
    return (content * _odd_numbers(content.numel(), content.device)).sum()


@lru_cache(maxsize=64)
def _odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device)


def header_on(layout: PayloadLayout, sequence: int, device: torch.device) -> torch.Tensor:
    """The header on the device, without a copy from the host that would wait for it."""
    header = _unnumbered_header(layout, device).clone()
    header[_SEQUENCE].fill_(sequence)
    return header


@lru_cache(maxsize=64)
def _unnumbered_header(layout: PayloadLayout, device: torch.device) -> torch.Tensor:
    return torch.tensor(layout.header(0), device=device)


def words(size: int) -> int:
    """How many words hold `size` bytes."""
    return -(-size // WORD)
