# SPDX-License-Identifier: Apache-2.0
"""The loss of a model in transformers on a Megatron dataset."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_errors import ConversionError

#: .idx: what it begins with, and its codes of number types.
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_tokens(prefix: Path) -> np.ndarray[Any, Any]:
    """The tokens of PREFIX.bin, one document behind the other, mapped and not read.

    Raises:
        ConversionError: there is no such dataset.
    """
    data, index = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    for file in (data, index):
        if not file.is_file():
            raise ConversionError(
                f"--data {prefix}: there is no {file}; give the path without .bin and .idx"
            )
    with index.open("rb") as stream:
        head = stream.read(18)
    if len(head) < 18 or not head.startswith(_MAGIC) or head[17] not in _DTYPES:
        raise ConversionError(f"--data {prefix}: {index} is no index of a Megatron dataset")
    return np.memmap(data, dtype=_DTYPES[head[17]], mode="r")


class Windows:
    """Consecutive windows of a dataset, in the order of its file: `length` + 1 tokens each.

    The last token of one is the first of the next. Nothing but the batch at hand is in memory.

    Args:
        prefix: of the dataset.
        length: Megatron's --seq-length.
        count: how many, from the start; None for all.
        vocab_size: of the model.

    Raises:
        ConversionError: there is not enough data, or it is that of another tokenizer.
    """

    def __init__(self, prefix: Path, length: int, count: int | None, vocab_size: int) -> None:
        self._tokens, self.length = read_tokens(prefix), length
        available = (len(self._tokens) - 1) // length
        if available < 1:
            raise ConversionError(
                f"--data {prefix} has {len(self._tokens)} tokens, fewer than a sequence of "
                f"{length} and the token behind it"
            )
        self._count = available if count is None else min(count, available)
        largest = int(self._tokens[: self._count * length + 1].max())
        if largest >= vocab_size:
            raise ConversionError(
                f"--data {prefix} holds the token {largest}, but the model knows {vocab_size}; "
                "give data of its own tokenizer"
            )

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Tensor]:
        """int64 [at most `size`, length + 1], one after another."""
        for start in range(0, len(self), size):
            number = min(size, len(self) - start)
            first = start * self.length
            tokens = np.asarray(self._tokens[first : first + number * self.length + 1], np.int64)
            yield torch.from_numpy(tokens).unfold(0, self.length + 1, self.length)


@torch.no_grad()
def mean_loss(model: Any, samples: Windows, what: str, batch: int = 4) -> float:
    """Mean cross-entropy in nats over all tokens but the first of each sample.

    Args:
        model: a causal language model, on whose device it is computed.
        samples: what it is measured on.
        what: to be shown beside the progress bar.
        batch: samples at once.
    """
    total, model = 0.0, model.eval()
    with tqdm(total=len(samples), unit="sample", desc=what, disable=None) as bar:
        for part in samples.batches(batch):
            part = part.to(model.device)
            logits = model(part[:, :-1], use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses.double())
            bar.update(len(part))
    return total / (len(samples) * samples.length)
