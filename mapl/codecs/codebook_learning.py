# SPDX-License-Identifier: Apache-2.0
"""How the codebooks of residual vector quantisation start and learn.

An entry is the mean of the vectors that were given its code (k-means), with counts and sums
averaged exponentially over the steps (van den Oord et al., arXiv 1711.00937, appendix A.1). A code
that is hardly used any more starts anew beside one that is used much.

Shapes: G groups, R rounds, K codes, v = w / G numbers a vector.
"""

import math

import torch
from torch import Tensor

from mapl.codecs.counter_random import gaussian, stream_key, uniform

#: A code is dead if its count is below this share of the mean count of its codebook.
DEAD = 0.01

#: How far at most a revived code is moved from its neighbour, in units of the largest number in the
#: codebook: enough to survive rounding to bf16, little beside the distance between entries.
_NUDGE = 2.0**-6

#: A count that has decayed below this is as good as none: the quotient of subnormal numbers could
#: be anything.
NO_COUNT = 2.0**-80


def initial_codebook(
    groups: int, rounds: int, codes: int, size: int, wire: torch.dtype, seed: int
) -> Tensor:
    """Gaussian entries for vectors whose numbers have mean square 1, before any data.

    K codes for v numbers leave at best the share D = K^(−2/v) of a Gaussian's energy; entries that
    reach it have energy 1 − D (the rate-distortion function). Round ρ finds D^ρ left.

    Returns:
        [G, R, K, v] fp32 with values of the dtype `wire`.
    """
    shape = (groups, rounds, codes, size)
    # Both ends draw for themselves, perhaps on unlike hosts, and must hold the same bits.
    codebook = gaussian(stream_key(seed), math.prod(shape), torch.device("cpu")).view(shape)
    left = codes ** (-2 / size)
    for number in range(rounds):
        codebook[:, number] *= (left**number * (1 - left)) ** 0.5
    return codebook.to(wire).float()


def averaged(
    counts: Tensor, sums: Tensor, new_counts: Tensor, new_sums: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Counts and sums γ a + (1 − γ) b of an old a and a new b.

    Args:
        counts, new_counts: [G, R, K] fp32.
        sums, new_sums: [G, R, K, v] fp32.
        decay: γ of this step.
    """
    return (
        decay * counts + (1 - decay) * new_counts,
        decay * sums + (1 - decay) * new_sums,
    )


def centroids(counts: Tensor, sums: Tensor, otherwise: Tensor) -> Tensor:
    """sums / counts; `otherwise` where there is no count. Never NaN.

    Args:
        counts: [...] fp32.
        sums, otherwise: [..., v] fp32.
    """
    known = counts[..., None] > NO_COUNT
    return torch.where(known, sums / counts[..., None].clamp(min=NO_COUNT), otherwise)


def revived(counts: Tensor, sums: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Counts and sums after dead codes have been put beside much used ones.

    In each codebook the j-th least used code, j < K / 2, if it is dead, gets half the count and
    half the sum of the j-th most used one, and its entry is moved a little at random. That one
    keeps the other halves, hence its entry, unless it is dead itself: then both stay as they are.

    Processes that share the work of sending a codebook must come to the same bits, so there is no
    floating-point sum here whose rounding would depend on the hardware's order.

    Args:
        counts: [G, R, K] fp32.
        sums: [G, R, K, v] fp32.
        key: of the random numbers.
    """
    half = counts.shape[-1] // 2
    order = counts.argsort(dim=-1, stable=True)
    rare, common = order[..., :half], order.flip(-1)[..., :half]
    limit = _dead_below(counts)
    rare_counts, common_counts = counts.gather(-1, rare), counts.gather(-1, common)
    due = (rare_counts < limit) & (common_counts >= limit)

    counts_half = common_counts / 2
    new_counts = counts.scatter(-1, rare, torch.where(due, counts_half, rare_counts))
    new_counts.scatter_(-1, common, torch.where(due, counts_half, common_counts))

    size = sums.shape[-1]
    rare_rows, common_rows = (i[..., None].expand(-1, -1, -1, size) for i in (rare, common))
    rare_sums, common_sums = sums.gather(2, rare_rows), sums.gather(2, common_rows)
    entries = centroids(counts, sums, torch.zeros_like(sums))
    largest = entries.abs().amax((2, 3), keepdim=True)
    noise = uniform(key, common_sums.numel(), sums.device).view_as(common_sums)
    moved = common_sums / 2 + counts_half[..., None] * (2 * noise - 1) * _NUDGE * largest
    new_sums = sums.scatter(2, rare_rows, torch.where(due[..., None], moved, rare_sums))
    halved = torch.where(due[..., None], common_sums / 2, common_sums)
    new_sums.scatter_(2, common_rows, halved)
    return new_counts, new_sums


def usage(counts: Tensor) -> dict[str, float]:
    """How evenly the codes are used; waits for the device.

    Returns:
        `perplexity`: exp of the entropy of a codebook's counts, averaged over the codebooks: K if
        all codes are used alike, 1 if one is. `dead`: the share of dead codes. Before there is any
        data 1 and 0.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=NO_COUNT)
    entropy = torch.special.entr(shares).sum(-1)
    dead = counts < _dead_below(counts)
    return {"perplexity": float(entropy.exp().mean()), "dead": float(dead.float().mean())}


def _dead_below(counts: Tensor) -> Tensor:
    """[G, R, 1] fp64, where rounding is far too small to tell two processes apart."""
    return DEAD * counts.double().mean(-1, keepdim=True)
