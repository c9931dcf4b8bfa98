# SPDX-License-Identifier: Apache-2.0
"""Token ids as bytes: as few for each as hold the vocabulary."""

import torch
from torch import Tensor

#: One more than the largest id of an unpacked tensor.
_ID_LIMIT = 2**31


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


def pack_ids(ids: Tensor, size: int) -> Tensor:
    """The low `size` bytes of each id, little-endian: uint8 [ids.numel() · size]."""
    whole = ids.to(torch.int32).contiguous().flatten().view(torch.uint8).view(-1, 4)
    return whole[:, :size].flatten()


def unpack_ids(data: Tensor, size: int) -> Tensor:
    """The inverse of `pack_ids`: int32 [data.numel() / size]."""
    whole = data.new_zeros(data.numel() // size, 4)
    whole[:, :size] = data.view(-1, size)
    return whole.view(torch.int32).flatten()
