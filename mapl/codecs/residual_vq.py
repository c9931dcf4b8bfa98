# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantisation with codebooks that are learned while they are used.

Method: "MAPL+VQ" of Janson, Oyallon, Belilovsky, arXiv 2606.05484. What it leaves open is settled
here and in mapl.codecs.codebook_learning.

A row of w numbers, divided by its root mean square, is cut into G vectors of v = w / G. Each is
replaced by a sum of R entries, one from each codebook [K, v] of its group: the entry next to the
vector, the one next to what that leaves, and so on. A row takes G R log2 K bits and a bf16 scale.

The sender learns a master codebook. Both ends hold a copy of it, and the sender quantises with its
copy of what the receiver has, so they decode alike bit for bit however old the copy is. The copy
follows the master in one of three ways:

- streaming: each payload carries some entries (mapl.codecs.codebook_stream); and since the master
  moves most at the start, the whole codebook crosses after updates 1, 2, 4, 8 and 16;
- frozen: the whole codebook crosses after those updates, then never again;
- full: the whole codebook crosses after each update.

In a step the caller

1. sends any number of payloads, each decoded in the order of its encoding,
2. once all of them are decoded, calls `update` on both ends, on the sender with the sum of
   `statistics` over the processes that hold the same master,
3. where `whole_due`, hands what `whole` gives on the sender to `take_whole` on the receiver.

Shapes: n rows of w numbers, G groups of v = w / G, R rounds, K codes, e entries a payload.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mapl.codecs import codebook_learning as learning
from mapl.codecs import residual_search
from mapl.codecs.base import Codec
from mapl.codecs.bits import pack_bits, packed_bytes, unpack_bits
from mapl.codecs.casting import as_bytes, copy_clamped
from mapl.codecs.codebook_stream import CodebookStream
from mapl.codecs.counter_random import stream_key
from mapl.codecs.settings import CodecSettings, check_rvq, default_rvq_groups
from mapl.fp32 import keep_dtype
from mapl.ops import use_triton
from mapl.ops.gathered import has_kernels
from mapl.ops.gathered_operands import GatheredOperands

#: After these updates the whole codebook crosses; by the last one it hardly moves any more.
WHOLE_AFTER = frozenset({1, 2, 4, 8, 16})

#: Larger groups and rows go through the plain code on a GPU too: there a group is no longer small
#: beside what the tensor cores take at once, nor a row beside the registers of a program.
_LARGEST_SIZE, _LARGEST_WIDTH = 32, 8192

#: More than what fp32 arithmetic can add to an error.
_ROUNDING = 1.0001

# What the random numbers are for; each purpose has its own.
_START, _ORDER, _REVIVAL = range(3)


class ResidualVQCodec(Codec):
    """One end of one direction; both ends are built alike but for `shard` and `sends`.

    A row of zeros decodes to zeros, one that holds a NaN or an inf to NaN throughout; other decoded
    numbers are clamped to the finite range of the receiving dtype. Nothing here waits for the
    device but `usage`, and the first use after a checkpoint was loaded.

    Args:
        width: w.
        wire: the dtype in which entries cross.
        settings: its `rvq_` fields are G, R, K, γ, how and in what order entries cross, and e.
        seed: of all that is random, the same at both ends.
        shards: T, how many processes each send a part of the same rows and other entries.
        shard: t, which of them this end is, if it sends.
        sends: whether this end encodes or decodes.

    Attributes:
        codebook: [G, R, K, v] fp32 buffer, the copy that both ends hold; all its values are
            numbers of the dtype `wire`. Like all buffers here it stays fp32 in a model of any
            dtype.
        updates: 0-dim int64 buffer, calls of `update` so far.
        counts: [G, R, K] fp32 buffer of the sender, how often each code is used (averaged).
        sums: [G, R, K, v] fp32 buffer of the sender, the sum of the vectors that were given the
            code; sums / counts is the master.

    Raises:
        ValueError: see `mapl.codecs.settings.check_rvq`.
    """

    codebook: Tensor
    updates: Tensor
    counts: Tensor
    sums: Tensor
    #: Counts, then sums, of the training payloads since the last update; not saved.
    fresh: Tensor

    def __init__(
        self,
        width: int,
        wire: torch.dtype,
        settings: CodecSettings,
        seed: int,
        *,
        shards: int = 1,
        shard: int = 0,
        sends: bool = True,
    ) -> None:
        super().__init__()
        check_rvq(settings, width=width, shards=shards)
        self.width, self.wire, self.settings, self.seed = width, wire, settings, seed
        self.shards, self.sends = shards, sends
        self.groups = settings.rvq_groups or default_rvq_groups(width)
        self.rounds, self.codes = settings.rvq_rounds, settings.rvq_codes
        self.code_bits = self.codes.bit_length() - 1
        self.size = width // self.groups
        self.stream: CodebookStream | None = None
        if settings.rvq_sync == "streaming":
            self.stream = CodebookStream(
                self.codes,
                settings.rvq_sync_entries,
                shards,
                shard,
                settings.rvq_order,
                stream_key(seed, _ORDER),
            )
        start = learning.initial_codebook(
            self.groups, self.rounds, self.codes, self.size, wire, stream_key(seed, _START)
        )
        self.register_buffer("codebook", start)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._update_count: int | None = 0
        if sends:
            counts, sums = torch.zeros(start.shape[:3]), torch.zeros_like(start)
            self.register_buffer("counts", counts)
            self.register_buffer("sums", sums)
            self._used: Tensor | None = None  # the counts before the last revival
            fresh = torch.zeros(counts.numel() + sums.numel())
            self.register_buffer("fresh", fresh, persistent=False)

    def parts(self, rows: int) -> dict[str, int]:
        """Entries [G, R, e, v] if any are streamed, scales [n], then the codes [n, G, R]."""
        parts = {}
        if self.stream is not None:
            numbers = self.groups * self.rounds * self.stream.entries * self.size
            parts["codebook"] = numbers * self.wire.itemsize
        parts["scales"] = rows * torch.bfloat16.itemsize
        parts["latents"] = packed_bytes(rows * self.groups * self.rounds, self.code_bits)
        return parts

    @torch.no_grad()
    def encode(self, rows: Tensor, number: int) -> Tensor:
        """See `Codec`. While the module is in training mode the rows count for the next update,
        but for those that are zero or not finite.

        Raises:
            RuntimeError: this end does not send.
        """
        self._only_the_sender("encode")
        if self._fused(rows):
            whole = rows.new_empty(self.body_bytes(len(rows)), dtype=torch.uint8)
            self.encode_into(rows, number, whole)
            return whole
        entries = self._streamed(number)
        scales, quotients = residual_search.normalised(rows)
        vectors = quotients.view(-1, self.groups, self.size)
        codes = residual_search.search(vectors, self.codebook)
        if self.training:
            weights = (scales.isfinite() & (scales > 0)).float()
            counts, sums = self._split(self.fresh)
            residual_search.add_statistics(
                vectors, codes, self.codebook, weights, counts.view(-1), sums.view(-1, self.size)
            )
        body = [] if entries is None else [as_bytes(entries)]
        return torch.cat([*body, as_bytes(scales), pack_bits(codes.flatten(), self.code_bits)])

    @torch.no_grad()
    def encode_into(self, rows: Tensor, number: int, out: Tensor) -> None:
        """See `Codec` and `encode`."""
        if not self._fused(rows):
            super().encode_into(rows, number, out)
            return
        from mapl.ops.kernels import rvq, rvq_stream

        self._only_the_sender("encode")
        parts = self.split(out, len(rows))
        if self.stream is not None:
            due = self.stream.due(number, self.codebook.device)
            entries = parts["codebook"].view(self.wire)
            mine = self.stream.mine
            rvq_stream.send(
                self.codebook, self.counts, self.sums, due, mine, entries, learning.NO_COUNT
            )
        bytewise = self.code_bits == 8
        codes = parts["latents"]
        if not bytewise:
            count = len(rows) * self.groups * self.rounds
            codes = torch.empty(count, dtype=torch.int32, device=rows.device)
        rvq.encode(
            rows,
            self.codebook,
            parts["scales"].view(torch.bfloat16),
            codes,
            self._split(self.fresh) if self.training else None,
            exact=self.wire != torch.float32,
        )
        if not bytewise:
            parts["latents"].copy_(pack_bits(codes, self.code_bits))

    @torch.no_grad()
    def decode(self, bodies: Sequence[Tensor], out: Tensor, number: int) -> None:
        """See `Codec`. Takes the entries of all bodies before it decodes any.

        Raises:
            RuntimeError: this end sends.
            ValueError: not one body of each sending process.
        """
        self._take_entries(bodies, out.shape[0], number)
        super().decode(bodies, out, number)

    @torch.no_grad()
    def product_from(
        self, bodies: Sequence[Tensor], number: int, operands: GatheredOperands
    ) -> Tensor:
        """See `Codec` and `decode`."""
        left, table, ids, weight = operands
        if not (has_kernels(left) and self._fused(left) and len(bodies) == self.shards == 1):
            return super().product_from(bodies, number, operands)
        from mapl.ops.kernels.side_by_side import from_rvq

        self._take_entries(bodies, len(left), number)
        scales, codes = self._scales_and_codes(bodies[0], len(left))
        return torch.mm(from_rvq(scales, codes, self.codebook, left, table, ids), weight)

    @torch.no_grad()
    def decode_rows(self, body: Tensor, out: Tensor) -> None:
        """Decodes one body with the copy as it stands; takes no entries."""
        rows = out.shape[0]
        parts = self.split(body, rows)
        if self._fused(out) and out.is_contiguous():
            from mapl.ops.kernels import rvq

            rvq.decode(*self._scales_and_codes(body, rows), self.codebook, out)
            return
        codes = unpack_bits(parts["latents"], self.code_bits, rows * self.groups * self.rounds)
        vectors = residual_search.reconstructed(
            self.codebook, codes.view(rows, self.groups, self.rounds)
        )
        scales = parts["scales"].view(torch.bfloat16).float()
        copy_clamped(vectors.view(rows, self.width) * scales[:, None], out)

    def statistics(self) -> Tensor:
        """Counts and sums since the last update, flat fp32: add up over replicas in place.

        Raises:
            RuntimeError: this end does not send.
        """
        self._only_the_sender("give statistics")
        return self.fresh

    @torch.no_grad()
    def update(self, statistics: Tensor | None) -> None:
        """Ends a step: moves the master, revives dead codes, clears `statistics`.

        In update t, from 0, counts and sums are averaged with decay min(γ, 1 − 1 / (t + 1)), so the
        first one takes the data alone. Without any data nothing but `updates` changes.

        Args:
            statistics: the sum of `statistics` over replicas; None on the end that receives.

        Raises:
            ValueError: statistics on the receiving end, or none on the sending end.
        """
        if (statistics is None) == self.sends:
            raise ValueError("statistics are for the sending end of a codebook, and only for it")
        number = self._updates_so_far()
        if statistics is not None:
            decay = min(self.settings.rvq_decay, 1 - 1 / (number + 1))
            new_counts, new_sums = self._split(statistics)
            counts, sums = learning.averaged(self.counts, self.sums, new_counts, new_sums, decay)
            self._used = counts
            counts, sums = learning.revived(counts, sums, stream_key(self.seed, _REVIVAL, number))
            any_data = new_counts.sum() > 0
            self.counts.copy_(torch.where(any_data, counts, self.counts))
            self.sums.copy_(torch.where(any_data, sums, self.sums))
            self.fresh.zero_()
        self.updates.add_(1)
        self._update_count = number + 1

    def whole_due(self) -> bool:
        """Whether the whole codebook has to cross after the update that was the last."""
        number = self._updates_so_far()
        return number > 0 if self.settings.rvq_sync == "full" else number in WHOLE_AFTER

    def whole_bytes(self) -> int:
        """Bytes of `whole`."""
        return self.codebook.numel() * self.wire.itemsize

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The master [G, R, K, v] in the wire dtype, uint8; this end's copy becomes the same.

        Raises:
            RuntimeError: this end does not send.
        """
        self._only_the_sender("give its codebook")
        entries = self._master()
        self.codebook.copy_(entries)
        return as_bytes(entries)

    @torch.no_grad()
    def take_whole(self, data: Tensor) -> None:
        """Makes this end's copy what `whole` gave on the other, uint8 [whole_bytes()]."""
        self.codebook.copy_(data.view(self.wire).view(self.codebook.shape))

    def usage(self) -> dict[str, float]:
        """Mean perplexity of the codebooks and share of dead codes; waits for the device.

        As the last update found them, before it revived the dead ones.

        Raises:
            RuntimeError: this end does not send.
        """
        self._only_the_sender("tell its usage")
        return learning.usage(self.counts if self._used is None else self._used)

    def error_bound(self, rows: Tensor) -> Tensor:
        """See `Codec`.

        Nearest neighbour search leaves no more than ‖e‖ + min ‖c‖ of a vector e, in each round. So
        this holds for any codebook; how well one that is learned does is a matter of the data.
        """
        scales, quotients = residual_search.normalised(rows)
        lengths = quotients.double().view(-1, self.groups, self.size).norm(dim=2)
        shortest = self.codebook.double().norm(dim=3).amin(2).sum(1)
        bound: Tensor = scales.double()[:, None] * (lengths + shortest) * _ROUNDING
        return bound.repeat_interleave(self.size, dim=1)

    def _scales_and_codes(self, body: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Scales bf16 [n] and codes [n G R], bytes or int32, of one body."""
        parts = self.split(body, rows)
        codes = parts["latents"]
        if self.code_bits != 8:
            codes = unpack_bits(codes, self.code_bits, rows * self.groups * self.rounds)
        return parts["scales"].view(torch.bfloat16), codes

    def _take_entries(self, bodies: Sequence[Tensor], rows: int, number: int) -> None:
        """Gives the copy the entries that came with payload `number` of `rows` rows in all.

        Raises:
            RuntimeError: this end sends.
            ValueError: not one body of each sending process.
        """
        if self.sends:
            raise RuntimeError("the sending end of a codebook cannot decode: its copy is ahead")
        if len(bodies) != self.shards:
            raise ValueError(f"{len(bodies)} bodies arrived from {self.shards} sending processes")
        if self.stream is not None:
            self._take_streamed(self.stream, bodies, rows // self.shards, number)

    def _take_streamed(
        self, stream: CodebookStream, bodies: Sequence[Tensor], rows: int, number: int
    ) -> None:
        """Gives the copy the entries in all bodies of payload `number`, `rows` rows each."""
        due = stream.due(number, self.codebook.device)
        received = [self.split(body, rows)["codebook"].view(self.wire) for body in bodies]
        if use_triton(self.codebook):
            from mapl.ops.kernels import rvq_stream

            for shard, entries in enumerate(received):
                theirs = slice(shard * stream.entries, (shard + 1) * stream.entries)
                rvq_stream.take(self.codebook, due, theirs, entries)
            return
        shape = (self.groups, self.rounds, stream.entries, self.size)
        whole = torch.cat([entries.view(shape) for entries in received], 2)
        self.codebook.index_copy_(2, due, whole.float())

    def _fused(self, tensor: Tensor) -> bool:
        """Whether rows are coded by the kernels of mapl.ops.kernels.rvq."""
        small = self.size <= _LARGEST_SIZE and self.width <= _LARGEST_WIDTH
        return small and use_triton(tensor)

    def _streamed(self, number: int) -> Tensor | None:
        """This process's entries for payload `number` in the wire dtype, [G, R, e, v], if any.

        The copy takes all shards' entries, for that is what the receiver has when it decodes this
        payload.
        """
        if self.stream is None:
            return None
        due = self.stream.due(number, self.codebook.device)
        entries = self._master(due)
        self.codebook.index_copy_(2, due, entries.float())
        return entries[:, :, self.stream.mine]

    def _master(self, which: Tensor | None = None) -> Tensor:
        """The master's entries in the wire dtype, [G, R, K, v] or those of some codes.

        A code that was never used has the entry of the copy.
        """
        counts, sums, copy = self.counts, self.sums, self.codebook
        if which is not None:
            counts, sums, copy = (full.index_select(2, which) for full in (counts, sums, copy))
        return learning.centroids(counts, sums, copy).to(self.wire)

    def _split(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Counts [G, R, K] and sums [G, R, K, v] as views of what `statistics` gives."""
        counts, sums = statistics.split([self.counts.numel(), self.sums.numel()])
        return counts.view_as(self.counts), sums.view_as(self.sums)

    def _updates_so_far(self) -> int:
        """`updates`, read from the device only after it was loaded."""
        if self._update_count is None:
            self._update_count = int(self.updates)
        return self._update_count

    def _only_the_sender(self, what: str) -> None:
        if not self.sends:
            raise RuntimeError(f"the receiving end of a codebook cannot {what}; it has no master")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_count = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtype(fn), recurse)
        return self
