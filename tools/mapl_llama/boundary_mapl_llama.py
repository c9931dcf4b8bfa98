# SPDX-License-Identifier: Apache-2.0
"""A boundary between two pipeline stages, as one function of the activations that cross it.

    Z = [X | C]·[A ; −P A]        Ẑ = codec(Z)        X̂ = [Ẑ | C′]·[Aᵀ ; P′]

X [n, d], A [d, r] with orthonormal columns. C and C′ [n, k] are the tokens' anchor coordinates at
the sending and at the receiving stage, P and P′ [k, d] the anchors' bases; anchors without a basis
are d wide themselves and take −A and the identity in its place.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .codecs_mapl_llama import build_codec
from .configuration_mapl_llama import MaplLlamaConfig

_PRIME = 2147483647
_OF_ID, _OF_PREDECESSOR, _SHIFT = 1640531527, 1181783497, 971215073


class MaplAnchor(nn.Module):
    """The tables of one stage: what a token, and the one before it, say of the activation."""

    def __init__(self, config: MaplLlamaConfig) -> None:
        super().__init__()
        width, buckets = config.mapl_anchor_rank, config.mapl_anchor_buckets
        # Not `nn.Embedding`, which transformers would take for one of the model's inputs.
        self.tokens = nn.Parameter(torch.zeros(config.vocab_size, width))
        self.bigrams = None
        if config.mapl_anchor == "bigram":
            self.bigrams = nn.Parameter(torch.zeros(buckets, width))

    def forward(self, ids: Tensor, predecessors: Tensor | None) -> Tensor:
        """Coordinates [b, s, k] of tokens [b, s]."""
        coordinates = self.tokens[ids]
        if self.bigrams is None:
            return coordinates
        assert predecessors is not None
        one = ids.long() * _OF_ID % _PRIME
        other = (predecessors.long() + 1) * _OF_PREDECESSOR % _PRIME
        return coordinates + self.bigrams[(one + other + _SHIFT) % _PRIME % len(self.bigrams)]


class MaplBoundary(nn.Module):
    """What the `number`-th compressed boundary does to the activations."""

    def __init__(self, config: MaplLlamaConfig, number: int) -> None:
        super().__init__()
        here: dict[str, Any] = (config.mapl_boundaries or [])[number]
        d, r = config.hidden_size, here["rank"]
        self.sender, self.receiver = here["sender"], here["receiver"]
        self.has_anchor = config.mapl_anchor != "none"
        self.has_basis = config.mapl_anchor in ("factorized", "bigram")
        k = config.mapl_anchor_rank if self.has_basis else 0
        self.encoder = self.decoder = None
        if config.mapl_projector:
            self.encoder = nn.Parameter(torch.zeros(d + k, r), requires_grad=False)
            self.decoder = nn.Parameter(torch.zeros(r + k, d), requires_grad=False)
        self.codec = build_codec(here["codec"], r, {**(config.mapl_codec or {}), **here})

    def forward(self, hidden: Tensor, anchors: dict[int, Tensor]) -> Tensor:
        """X̂ [b, s, d] from X; `anchors` gives the coordinates [b, s, k] at each stage."""
        rows = hidden.flatten(0, -2)
        sent = received = None
        if self.has_anchor:
            sent, received = (
                anchors[stage].flatten(0, -2) for stage in (self.sender, self.receiver)
            )
        latent = _StraightThrough.apply(self._encode(rows, sent), self.codec)
        return self._decode(latent, received).view(hidden.shape)

    def _encode(self, rows: Tensor, coordinates: Tensor | None) -> Tensor:
        if self.encoder is None:
            return rows
        down, anchor_down = self.encoder.split([rows.shape[1], len(self.encoder) - rows.shape[1]])
        latent = torch.mm(rows, down)
        if coordinates is None:
            return latent
        if not self.has_basis:
            return torch.addmm(latent, coordinates, down, alpha=-1)
        return torch.addmm(latent, coordinates, anchor_down)

    def _decode(self, latent: Tensor, coordinates: Tensor | None) -> Tensor:
        if self.decoder is None:
            return latent
        if coordinates is None:
            return torch.mm(latent, self.decoder)
        if not self.has_basis:
            return torch.addmm(coordinates, latent, self.decoder)
        return torch.mm(torch.cat([latent, coordinates], 1), self.decoder)


class _StraightThrough(torch.autograd.Function):
    """What arrives forward, and gradients backward as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, codec: nn.Module) -> Tensor:
        arrived: Tensor = codec(latent)
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
