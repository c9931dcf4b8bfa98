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

A payload that fails its check raises `PayloadError` at once on the CPU. On a GPU that would stall
the stream, so the check only sets a flag there, which `PayloadGuard.raise_if_faulty` reads once a
step.
"""

import enum
from dataclasses import dataclass, field
from functools import lru_cache

import torch

MAGIC = int.from_bytes(b"MAPL", "little")
FORMAT_VERSION = 1
WORD = 8
HEADER_WORDS = 4
_SEQUENCE = 2  # the header's word that changes from payload to payload

#: One more than the largest id.
_ID_LIMIT = 2**31

#: Stands for "no payload" where a sequence number is expected.
_NONE = torch.iinfo(torch.int64).max


class Direction(enum.IntEnum):
    """What a payload is: an activation, its gradient, or the projector's gradient of a step."""

    FORWARD = 0
    BACKWARD = 1
    PROJECTOR = 2


class PayloadError(RuntimeError):
    """A payload is not what this side expects; names boundary, direction and sequence number."""


def id_size(vocab_size: int) -> int:
    """The fewest bytes that hold each of the ids 0 … vocab_size − 1: 1, 2, 3 or 4.

    Raises:
        ValueError: the vocabulary is larger than int32, the type of an unpacked id, holds.
    """
    if vocab_size > _ID_LIMIT:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens exceeds the id type of a payload, int32 "
            f"({_ID_LIMIT} tokens); use a tokenizer with fewer"
        )
    return max(1, -(-(vocab_size - 1).bit_length() // 8))


@dataclass(frozen=True)
class PayloadLayout:
    """The sizes of one payload, the same on both sides of the boundary."""

    boundary: int
    direction: Direction
    body_bytes: int
    id_count: int = 0
    id_size: int = 4

    @property
    def id_bytes(self) -> int:
        """Bytes of the token ids, without padding."""
        return self.id_count * self.id_size

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole payload."""
        words = HEADER_WORDS + _words(self.id_bytes) + _words(self.body_bytes) + 1
        return words * WORD

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
    if (0 if ids is None else ids.numel()) != layout.id_count:
        raise ValueError(
            f"{0 if ids is None else ids.numel()} token ids do not fit the layout's "
            f"{layout.id_count}"
        )
    payload = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=body.device)
    words = payload.view(torch.int64)
    words[:HEADER_WORDS] = _header(layout, sequence, body.device)
    start = HEADER_WORDS * WORD
    if ids is not None:
        payload[start : start + layout.id_bytes] = _narrow(ids, layout.id_size)
        start += _words(layout.id_bytes) * WORD
    payload[start : start + layout.body_bytes] = body
    words[-1] = checksum(words[:-1])
    return payload


@dataclass
class PayloadGuard:
    """Checks payloads: at once on the CPU, by a flag that is read once a step on other devices."""

    _faulty: dict[tuple[int, Direction], torch.Tensor] = field(default_factory=dict)

    def unpack(
        self, layout: PayloadLayout, sequence: int, payload: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Takes a payload apart.

        Returns:
            The ids int32 [id_count], or None if it has none, and the body uint8 [body_bytes], a
            view of the payload.

        Raises:
            PayloadError: the payload is not the one that is due here, or was damaged (on the CPU;
                elsewhere `raise_if_faulty` raises it).
        """
        if payload.numel() != layout.total_bytes:
            raise PayloadError(
                f"{_place(layout)}, payload {sequence}: {payload.numel()} bytes arrived, "
                f"{layout.total_bytes} are due: both sides must run with the same flags"
            )
        self._check(layout, sequence, payload.view(torch.int64))
        start = HEADER_WORDS * WORD
        ids = None
        if layout.id_count:
            ids = _widen(payload[start : start + layout.id_bytes], layout.id_size)
            start += _words(layout.id_bytes) * WORD
        return ids, payload[start : start + layout.body_bytes]

    def _check(self, layout: PayloadLayout, sequence: int, words: torch.Tensor) -> None:
        if words.device.type != "cpu":
            self.flag(layout, sequence, words)
            return
        due = layout.header(sequence)
        if words[:HEADER_WORDS].tolist() != due:
            raise PayloadError(_explain(layout, words[:HEADER_WORDS].tolist(), due))
        if int(checksum(words[:-1])) != int(words[-1]):
            raise PayloadError(
                f"{_place(layout)}, payload {sequence}: the checksum does not match: the bytes "
                "were changed on the way; check the network and the hosts of this boundary"
            )

    def flag(self, layout: PayloadLayout, sequence: int, words: torch.Tensor) -> None:
        """Checks a payload (int64 words) without waiting for the device.

        What is wrong shows in the next `raise_if_faulty`.
        """
        due = _header(layout, sequence, words.device)
        bad = (words[:HEADER_WORDS] != due).any() | (checksum(words[:-1]) != words[-1])
        # The first bad payload is the one to name.
        mark = torch.where(bad, sequence, _NONE)
        place = (layout.boundary, layout.direction)
        before = self._faulty.get(place)
        self._faulty[place] = mark if before is None else torch.minimum(before, mark)

    def raise_if_faulty(self) -> None:
        """Reads the flags of the payloads since the last call.

        Raises:
            PayloadError: one of them was not what was due.
        """
        faulty, self._faulty = self._faulty, {}
        if not faulty:
            return
        for place, mark in zip(faulty, torch.stack(list(faulty.values())).tolist(), strict=True):
            if mark != _NONE:
                raise PayloadError(
                    f"boundary {place[0]}, {place[1].name.lower()}, payload {mark}: header or "
                    "checksum is wrong: the peers are out of step or the bytes were changed on "
                    "the way"
                )


def _narrow(ids: torch.Tensor, size: int) -> torch.Tensor:
    """The low `size` bytes of each id: uint8 [ids.numel() · size]."""
    whole = ids.to(torch.int32).contiguous().flatten().view(torch.uint8).view(-1, 4)
    return whole[:, :size].flatten()


def _widen(data: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `_narrow`: int32 [data.numel() / size]."""
    whole = data.new_zeros(data.numel() // size, 4)
    whole[:, :size] = data.view(-1, size)
    return whole.view(torch.int32).flatten()


def checksum(words: torch.Tensor) -> torch.Tensor:
    """Σ word_i · (2 i + 1) modulo 2^64 of an int64 vector, as a 0-dim int64 tensor."""
    return (words * _odd_numbers(words.numel(), words.device)).sum()


@lru_cache(maxsize=64)
def _odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device)


def _header(layout: PayloadLayout, sequence: int, device: torch.device) -> torch.Tensor:
    """The header on the device, without a copy from the host that would wait for it."""
    header = _unnumbered_header(layout, device).clone()
    header[_SEQUENCE].fill_(sequence)
    return header


@lru_cache(maxsize=64)
def _unnumbered_header(layout: PayloadLayout, device: torch.device) -> torch.Tensor:
    return torch.tensor(layout.header(0), device=device)


def _words(size: int) -> int:
    return -(-size // WORD)


def _place(layout: PayloadLayout) -> str:
    return f"boundary {layout.boundary}, {layout.direction.name.lower()}"


def _explain(layout: PayloadLayout, got: list[int], due: list[int]) -> str:
    where = f"{_place(layout)}, payload {due[2]}: "
    if got[0] & 0xFFFFFFFF != MAGIC:
        return where + "what arrived is no payload of MAPL: the bytes were changed on the way"
    if got[0] != due[0]:
        return where + f"format version {got[0] >> 32} arrived, {FORMAT_VERSION} is due"
    if got[1] != due[1]:
        return where + (
            f"a payload of boundary {got[1] >> 8}, direction {got[1] & 0xFF}, arrived: the "
            "stages are out of step"
        )
    if got[2] != due[2]:
        return where + f"payload {got[2]} arrived: the stages are out of step"
    return where + (
        f"it says {got[3]} bytes, {due[3]} are due: both sides must run with the same flags"
    )
