# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of residual vector quantisation: scales, search, sums.

Shapes: n rows of w numbers, cut into G groups of v = w / G; R rounds, K codes.
"""

import torch
from torch import Tensor

from mapl.codecs.casting import SMALLEST_SCALE, bf16_nearest
from mapl.fp32 import full_precision

#: Bytes that the scores of all codes for a part of the rows may take.
_SCORE_BYTES = 64 * 2**20


def normalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its scale, the root mean square rounded to bf16.

    A row of zeros has scale 0, one that is not finite scale NaN; the quotients of both are zeros. A
    root mean square below 2⁻¹²⁶ counts as that.

    Args:
        rows: [n, w].

    Returns:
        Scales bf16 [n] and quotients fp32 [n, w].
    """
    wide = rows.float()
    largest = wide.abs().amax(1, keepdim=True)
    # Squares of the rows themselves would leave the range of fp32.
    unit = largest.clamp(min=SMALLEST_SCALE)
    rms = unit * (wide / unit).square().mean(1, keepdim=True).sqrt()
    scales = bf16_nearest(torch.where(largest == 0, 0.0, rms.clamp(min=SMALLEST_SCALE)))
    return scales.flatten(), torch.nan_to_num(wide / scales.float(), nan=0.0)


def search(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Codes, greedily: in each round the entry next to what the rounds before have left.

    argmin ‖e − c‖² = argmax (e·c − ‖c‖² / 2), in fp32.

    Args:
        vectors: [n, G, v] fp32.
        codebook: [G, R, K, v] fp32.

    Returns:
        int64 [n, G, R].
    """
    groups, rounds, codes, _ = codebook.shape
    offsets = codebook.square().sum(3).mul_(0.5)
    step = max(1, _SCORE_BYTES // (4 * groups * codes))
    found = torch.empty(*vectors.shape[:2], rounds, dtype=torch.int64, device=vectors.device)
    with full_precision(vectors.device):
        for residual, out in zip(vectors.split(step), found.split(step), strict=True):
            for number in range(rounds):
                scores = torch.baddbmm(
                    offsets[:, number, None],
                    residual.transpose(0, 1),
                    codebook[:, number].transpose(1, 2),
                    beta=-1,
                )
                out[..., number] = scores.argmax(2).T
                residual = residual - chosen(codebook, out, number)
    return found


def chosen(codebook: Tensor, codes: Tensor, number: int) -> Tensor:
    """The entries of one round, fp32 [n, G, v].

    Args:
        codebook: [G, R, K, v].
        codes: [n, G, R].
        number: the round.
    """
    return codebook.flatten(0, 2)[flat_codes(codebook, codes, number)]


def flat_codes(codebook: Tensor, codes: Tensor, number: int) -> Tensor:
    """Where the entries of one round are among all G R K of them, int64 [n, G]."""
    groups, rounds, count, _ = codebook.shape
    start = torch.arange(groups, device=codes.device) * rounds + number
    return start * count + codes[..., number]


def reconstructed(codebook: Tensor, codes: Tensor) -> Tensor:
    """The sum of the entries of all rounds, always in the same order: fp32 [n, G, v]."""
    total = chosen(codebook, codes, 0)
    for number in range(1, codebook.shape[1]):
        total = total + chosen(codebook, codes, number)
    return total


def add_statistics(
    vectors: Tensor,
    codes: Tensor,
    codebook: Tensor,
    weights: Tensor,
    counts: Tensor,
    sums: Tensor,
) -> None:
    """Adds to each code's count and sum the vectors, less earlier rounds, that were given it.

    Args:
        vectors: [n, G, v] fp32, finite.
        codes: [n, G, R], what `search` gave for them and the codebook.
        codebook: [G, R, K, v] fp32.
        weights: [n] fp32, 0 for a row that is to be left out, else 1.
        counts: [G R K] fp32, added to.
        sums: [G R K, v] fp32, added to.
    """
    each = weights[:, None].expand(codes.shape[:2]).flatten()
    residual = vectors
    for number in range(codebook.shape[1]):
        place = flat_codes(codebook, codes, number).flatten()
        counts.index_add_(0, place, each)
        sums.index_add_(0, place, residual.flatten(0, 1) * each[:, None])
        residual = residual - chosen(codebook, codes, number)
