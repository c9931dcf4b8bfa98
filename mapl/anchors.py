# SPDX-License-Identifier: Apache-2.0
"""Anchors: what a token's identity alone says about its activation, taken off before projection.

The anchor of a token is C·P: coordinates C = E[ids], k wide, times a basis P of k orthonormal
rows, d wide. Callers get C and P apart, so that nothing d wide need be formed (mapl.boundary).

One anchor belongs to each stage, not to each boundary: stage p+1 decodes at its input and encodes
at its output with the same E_{p+1}. The two sides of a boundary therefore use different tables,
E_p to encode and E_{p+1} to decode, and train them apart.

Shapes: V vocabulary, d hidden size, r_a anchor rank, k coordinate width (r_a or d).
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from mapl.coordinates import Coordinates
from mapl.fp32 import keep_dtype
from mapl.ngrams import bigram_buckets
from mapl.stiefel import random_stiefel
from mapl.summed_coordinates import SummedCoordinates

_MOST_BUCKETS = 131072


def default_buckets(vocab_size: int) -> int:
    """m of a bigram anchor: the next power of two from 4·V on, but at most 131072.

    So it does not depend on how the vocabulary is padded, or hardly ever.
    """
    return min(_MOST_BUCKETS, 1 << (4 * vocab_size - 1).bit_length())


class Anchor(nn.Module):
    """What every anchor has.

    Attributes:
        basis: P [k, d] fp32 with orthonormal rows; None stands for the identity, k = d.
        uses_ids: whether ``forward`` looks at the ids, so that they must reach this stage.
        uses_predecessors: whether it looks at the ids of the tokens before them too.
    """

    uses_ids: bool
    uses_predecessors = False
    basis: Tensor | None

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates | None:
        """Coordinates of the tokens, not gathered yet.

        Args:
            ids: token ids of any integer dtype and any shape, here [s, b].
            predecessors: ids of the tokens before them, of the same shape; −1 where a sequence
                begins. Needed if ``uses_predecessors``, else not looked at.

        Returns:
            C [*ids.shape, k] in the model's dtype, or None if there is no anchor.

        Raises:
            ValueError: ids that are not integers.
        """
        raise NotImplementedError

    def forward(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates | None:
        """The same, with the hooks of a module: whoever gathers parameters late waits in one."""
        return self.coordinates(ids, predecessors)


class NoAnchor(Anchor):
    """No anchor: Z = X·A."""

    uses_ids = False

    def __init__(self) -> None:
        super().__init__()
        self.basis = None

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> None:
        """None, whatever the ids."""
        return None


class FactorizedAnchor(Anchor):
    """A trained table E ∈ R^{V×r_a} times a fixed basis P ∈ R^{r_a×d} (arXiv 2606.05484).

    E starts at zero and follows the model's dtype. P is random with orthonormal rows and stays
    fp32, on the grid of no narrower type.

    Args:
        vocab_size: V.
        hidden_size: d.
        anchor_rank: r_a, 1 ≤ r_a ≤ d. It costs no traffic.
        generator: private CPU generator, seeded per stage.

    Raises:
        ValueError: sizes out of range.
    """

    uses_ids = True
    basis: Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, anchor_rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size, hidden_size)
        if not 1 <= anchor_rank <= hidden_size:
            raise ValueError(
                f"anchor rank must lie between 1 and the hidden size {hidden_size}, "
                f"got {anchor_rank}"
            )
        self.E = nn.Parameter(torch.zeros(vocab_size, anchor_rank))
        rows = random_stiefel(hidden_size, anchor_rank, generator).mT.contiguous()
        self.register_buffer("basis", rows)

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates:
        """C [*ids.shape, r_a]."""
        return Coordinates(self.E, ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        basis = self.basis
        super()._apply(fn, recurse)
        self.basis = keep_dtype(fn)(basis)
        return self


class BigramAnchor(FactorizedAnchor):
    """E[t_i] + B[h(t_{i−1}, t_i)] in place of E[t_i]: what a token and the one before it say.

    C_i = E[t_i] + B[h(t_{i−1}, t_i)],  h: V² → m by hashing (`mapl.ngrams.bigram_buckets`),

    both trained from zero. The ids are at both ends of a boundary anyway, so the predecessors cost
    no traffic either. Hashed n-gram embeddings of a model's input: Roy et al., arXiv 2207.06366.

    Args:
        vocab_size, hidden_size, anchor_rank, generator: as for `FactorizedAnchor`.
        buckets: m, rows of B ∈ R^{m×r_a}; bigrams that fall into one row share it.

    Raises:
        ValueError: sizes out of range.
    """

    uses_predecessors = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        anchor_rank: int,
        buckets: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(vocab_size, hidden_size, anchor_rank, generator)
        if buckets < 1:
            raise ValueError(f"a bigram anchor needs at least 1 bucket, got {buckets}")
        self.B = nn.Parameter(torch.zeros(buckets, anchor_rank))

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates:
        """C [*ids.shape, r_a].

        Raises:
            ValueError: predecessors that are missing or not integers, or of another shape.
        """
        if predecessors is None:
            raise ValueError(
                "a bigram anchor needs the ids of the tokens before; pass predecessors"
            )
        buckets = bigram_buckets(ids, predecessors, len(self.B))
        return SummedCoordinates([Coordinates(self.E, ids), Coordinates(self.B, buckets)])


class FullAnchor(Anchor):
    """A trained table E ∈ R^{V×d}, from zero: the upper bound, at V·d parameters a stage.

    Args:
        vocab_size: V.
        hidden_size: d.

    Raises:
        ValueError: sizes below 1.
    """

    uses_ids = True

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        _check_sizes(vocab_size, hidden_size)
        self.E = nn.Parameter(torch.zeros(vocab_size, hidden_size))
        self.basis = None

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates:
        """C [*ids.shape, d]."""
        return Coordinates(self.E, ids)


class StaticAnchor(Anchor):
    """A frozen table drawn from N(0, std²), as in Subspace Networks (arXiv 2506.01260).

    It cancels between encoder and decoder only if both hold the same table: unlike the trained
    anchors, every stage must seed its generator alike. The table follows the model's dtype.

    Args:
        vocab_size: V.
        hidden_size: d.
        generator: private CPU generator, seeded the same on every stage.
        std: standard deviation.

    Raises:
        ValueError: sizes below 1.
    """

    uses_ids = True
    table: Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, generator: torch.Generator, std: float = 0.02
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size, hidden_size)
        normal = torch.randn(vocab_size, hidden_size, generator=generator, device="cpu")
        self.register_buffer("table", normal.mul_(std))
        self.basis = None

    def coordinates(self, ids: Tensor, predecessors: Tensor | None = None) -> Coordinates:
        """C [*ids.shape, d]; nothing here is trained."""
        return Coordinates(self.table, ids)


def _check_sizes(vocab_size: int, hidden_size: int) -> None:
    if vocab_size < 1 or hidden_size < 1:
        raise ValueError(
            f"an anchor needs a vocabulary and a hidden size of at least 1, "
            f"got {vocab_size} and {hidden_size}"
        )


def build_anchor(
    kind: str,
    *,
    vocab_size: int,
    hidden_size: int,
    anchor_rank: int,
    generator: torch.Generator,
    static_std: float = 0.02,
    buckets: int | None = None,
) -> Anchor:
    """The anchor that ``kind`` names: none, factorized, bigram, static or full.

    Args:
        kind: its name.
        vocab_size: V.
        hidden_size: d.
        anchor_rank: r_a; factorized and bigram anchors alone have one.
        generator: private CPU generator; see the class for what it must share with other stages.
        static_std: standard deviation of the static anchor's table; the others have none.
        buckets: m, rows of the bigram anchor's second table; the others have none. Default:
            `default_buckets`.

    Raises:
        ValueError: a name that is not in the table, or sizes out of range.
    """
    if buckets is None:
        buckets = default_buckets(vocab_size)
    builders: dict[str, Callable[[], Anchor]] = {
        "none": NoAnchor,
        "factorized": lambda: FactorizedAnchor(vocab_size, hidden_size, anchor_rank, generator),
        "bigram": lambda: BigramAnchor(vocab_size, hidden_size, anchor_rank, buckets, generator),
        "static": lambda: StaticAnchor(vocab_size, hidden_size, generator, static_std),
        "full": lambda: FullAnchor(vocab_size, hidden_size),
    }
    if kind not in builders:
        raise ValueError(f"unknown anchor {kind!r}; choose one of {', '.join(builders)}")
    return builders[kind]()
