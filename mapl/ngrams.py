# SPDX-License-Identifier: Apache-2.0
"""Which row of a table stands for two tokens that follow each other."""

import torch
from torch import Tensor

#: 2³¹ − 1, a prime above every id; products with an id stay below 2⁶³.
_PRIME = 2147483647
_OF_ID, _OF_PREDECESSOR, _SHIFT = 1640531527, 1181783497, 971215073


def bigram_buckets(ids: Tensor, predecessors: Tensor, buckets: int) -> Tensor:
    """h = ((a·t_i + b·(t_{i−1} + 1) + c) mod p) mod m, Carter and Wegman's universal hashing.

    Two bigrams share a row with a probability of about 1/m. a, b, c and p are part of what a
    checkpoint's table means.

    Args:
        ids: t_i, integers of any shape.
        predecessors: t_{i−1} of the same shape; −1 where there is none.
        buckets: m.

    Returns:
        int64 of that shape, 0 … m − 1.

    Raises:
        ValueError: predecessors of another shape, or not integers.
    """
    if predecessors.is_floating_point() or predecessors.shape != ids.shape:
        raise ValueError(
            f"predecessors must be integers of the ids' shape {tuple(ids.shape)}, got "
            f"{predecessors.dtype} of shape {tuple(predecessors.shape)}"
        )
    one, other = ids.long() * _OF_ID % _PRIME, (predecessors.long() + 1) * _OF_PREDECESSOR % _PRIME
    return (one + other + _SHIFT) % _PRIME % buckets


def predecessors_of(ids: Tensor, before: Tensor | None = None) -> Tensor:
    """The ids one place earlier in each sequence.

    Args:
        ids: [s, b].
        before: [b], the ids before the first ones, of which −1 says that there is none. Default:
            the sequences begin here.

    Returns:
        [s, b] in the dtype of `ids`.
    """
    first = torch.full_like(ids[:1], -1) if before is None else before.view(1, -1)
    return torch.cat([first, ids[:-1]])
