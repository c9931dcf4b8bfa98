# SPDX-License-Identifier: Apache-2.0
"""The loss of a model in transformers on a Megatron dataset."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_checkpoint import ConversionError

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


def windows(prefix: Path, length: int, count: int | None, vocab_size: int) -> Tensor:
    """Samples as Megatron cuts them: `length` + 1 tokens, of which the last begins the next one.

    Args:
        prefix: of the dataset.
        length: Megatron's --seq-length.
        count: how many, from the start; None for all.
        vocab_size: of the model.

    Returns:
        int64 [n, length + 1].

    Raises:
        ConversionError: there is not enough data, or it is that of another tokenizer.
    """
    tokens = read_tokens(prefix)
    available = (len(tokens) - 1) // length
    if available < 1:
        raise ConversionError(
            f"--data {prefix} has {len(tokens)} tokens, fewer than a sequence of {length} and the "
            "token behind it"
        )
    number = available if count is None else min(count, available)
    starts = np.arange(number)[:, None] * length
    found = torch.from_numpy(np.asarray(tokens[starts + np.arange(length + 1)]).astype(np.int64))
    if int(found.max()) >= vocab_size:
        raise ConversionError(
            f"--data {prefix} holds the token {int(found.max())}, but the model knows "
            f"{vocab_size}; give data of its own tokenizer"
        )
    return found


@torch.no_grad()
def mean_loss(model: Any, samples: Tensor, what: str, batch: int = 4) -> float:
    """Mean cross-entropy in nats over all tokens but the first of each sample.

    Args:
        model: a causal language model, on whose device it is computed.
        samples: [n, s + 1].
        what: to be shown beside the progress bar.
        batch: samples at once.
    """
    total, model = 0.0, model.eval()
    with tqdm(total=len(samples), unit="sample", desc=what, disable=None) as bar:
        for part in samples.split(batch):
            part = part.to(model.device)
            logits = model(part[:, :-1], use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses.double())
            bar.update(len(part))
    return total / (samples.shape[0] * (samples.shape[1] - 1))
