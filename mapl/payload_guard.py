# SPDX-License-Identifier: Apache-2.0
"""Checks what arrives: whatever the bytes are, they give the payload that is due or a clear error.

A payload that fails its check raises `PayloadError` at once on the CPU. On a GPU that would stall
the stream, so the check only sets a flag there, which `PayloadGuard.raise_if_faulty` reads once a
step.
"""

from dataclasses import dataclass, field

import torch

from mapl.ops import use_triton
from mapl.payload import (
    FORMAT_VERSION,
    HEADER_WORDS,
    MAGIC,
    WORD,
    Direction,
    PayloadLayout,
    body_of,
    checksum,
    header_on,
)
from mapl.token_ids import unpack_ids

#: Stands for "no payload" where a sequence number is expected.
_NONE = torch.iinfo(torch.int64).max


class PayloadError(RuntimeError):
    """A payload is not what this side expects; names boundary, direction and sequence number."""


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
        body = body_of(layout, payload)
        if use_triton(payload):
            from mapl.ops.kernels import payload as kernels

            header, mark = layout.header(sequence), self._mark(layout, payload.device)
            sizes = layout.id_count, layout.id_size, layout.vocab_size
            return kernels.check(header, payload, mark, *sizes), body
        ids = None
        if layout.id_count:
            start = HEADER_WORDS * WORD
            ids = unpack_ids(payload[start : start + layout.id_bytes], layout.id_size)
        if payload.device.type == "cpu":
            _check(layout, sequence, payload.view(torch.int64), ids)
        else:
            self.flag(layout, sequence, payload.view(torch.int64), ids)
            if ids is not None:  # a look-up must not read beyond its table before the flag is read
                ids = ids.clamp(0, layout.vocab_size - 1)
        return ids, body

    def flag(
        self,
        layout: PayloadLayout,
        sequence: int,
        content: torch.Tensor,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Checks a payload (int64 words) and its ids without waiting for the device.

        What is wrong shows in the next `raise_if_faulty`.
        """
        due = header_on(layout, sequence, content.device)
        bad = (content[:HEADER_WORDS] != due).any() | (checksum(content[:-1]) != content[-1])
        if ids is not None:
            bad = bad | _strangers(layout, ids).any()
        # The first bad payload is the one to name.
        mark = self._mark(layout, content.device)
        mark.copy_(torch.minimum(mark, torch.where(bad, sequence, _NONE)))

    def _mark(self, layout: PayloadLayout, device: torch.device) -> torch.Tensor:
        """The number of the first bad payload of this boundary and direction, 0-dim int64."""
        place = (layout.boundary, layout.direction)
        if place not in self._faulty:
            self._faulty[place] = torch.full((), _NONE, device=device)
        return self._faulty[place]

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
                    f"boundary {place[0]}, {_said(place[1])}, payload {mark}: header, checksum or "
                    "a token id is wrong: the peers are out of step or the bytes were changed on "
                    "the way"
                )


def _check(
    layout: PayloadLayout, sequence: int, content: torch.Tensor, ids: torch.Tensor | None
) -> None:
    """Checks a payload (int64 words) and its ids at once."""
    due = layout.header(sequence)
    if content[:HEADER_WORDS].tolist() != due:
        raise PayloadError(_explain(layout, content[:HEADER_WORDS].tolist(), due))
    if int(checksum(content[:-1])) != int(content[-1]):
        raise PayloadError(
            f"{_place(layout)}, payload {sequence}: the checksum does not match: the bytes were "
            "changed on the way; check the network and the hosts of this boundary"
        )
    if ids is not None and bool(_strangers(layout, ids).any()):
        raise PayloadError(
            f"{_place(layout)}, payload {sequence}: it holds a token id that is not in the "
            f"vocabulary of {layout.vocab_size}: both sides must run with the same tokenizer"
        )


def _strangers(layout: PayloadLayout, ids: torch.Tensor) -> torch.Tensor:
    """Where an id is none of the vocabulary; four bytes may also read as a negative number."""
    return (ids < 0) | (ids > layout.vocab_size - 1)  # 2^31 itself would be no int32


def _said(direction: Direction) -> str:
    return direction.name.lower().replace("_", " ")


def _place(layout: PayloadLayout) -> str:
    return f"boundary {layout.boundary}, {_said(layout.direction)}"


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
