# SPDX-License-Identifier: Apache-2.0
"""Which codebook entries a payload carries, so that the receiver's copy follows the sender's.

The codes 0 … K − 1 go by in an endless cycle. Payload number N stands at the positions
N e T … (N + 1) e T − 1 of it, e of them for each of the T processes that send it, in order. The
numbers alone decide, so nothing is sent to say which entries these are, and neither end has a state
that could be lost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mapl.codecs.counter_random import hash64, stream_key
from mapl.codecs.settings import RvqOrder


@dataclass(frozen=True)
class CodebookStream:
    """The cycle, seen from one of the sending processes or from a receiving one.

    Attributes:
        codes: K.
        entries: e, with e T ≤ K.
        shards: T.
        shard: t, which of them this process is; a receiver needs none.
        order: "round-robin" goes from 0 to K − 1; "random" takes a new permutation each time.
        seed: of the permutations, the same at both ends.
    """

    codes: int
    entries: int
    shards: int
    shard: int
    order: RvqOrder
    seed: int

    @property
    def mine(self) -> slice:
        """This process's part of `due`."""
        return slice(self.shard * self.entries, (self.shard + 1) * self.entries)

    def due(self, number: int, device: torch.device) -> Tensor:
        """The codes in payload `number`, int64 [e T], those of process 0 first.

        They differ, but for a payload in which one random permutation ends and the next begins.
        There a code may occur twice; both have the same entry then.
        """
        count = self.entries * self.shards
        cycle, start = divmod(number * count, self.codes)
        first = self._permutation(cycle, device)[start : start + count]
        if len(first) == count:
            return first
        return torch.cat([first, self._permutation(cycle + 1, device)[: count - len(first)]])

    def _permutation(self, cycle: int, device: torch.device) -> Tensor:
        """The order of the codes in a cycle, [K].

        A permutation drawn on the host would have to wait for its copy to the device. Hashes of
        different indices under one key differ, so that sorting them is the same everywhere.
        """
        if self.order == "round-robin":
            return torch.arange(self.codes, device=device)
        return hash64(stream_key(self.seed, cycle), self.codes, device).argsort()
