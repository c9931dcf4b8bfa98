# SPDX-License-Identifier: Apache-2.0
"""Why `--mapl-projector-start-step` does not take the eigenvectors themselves for A."""

import pytest
import torch
from torch import Tensor

from mapl.codecs import CodecEnd, CodecSettings, Role, build_codec
from mapl.geometry import leading_directions, second_moment
from mapl.stiefel import nearest_basis, random_stiefel

D, RANK, TOKENS = 256, 128, 1024


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual(decay: float) -> Tensor:
    """R [n, d] of tokens whose i-th principal direction has the variance i^-decay."""
    directions = torch.linalg.qr(random_stiefel(D, D, seeded(1)).double()).Q
    deviations = torch.arange(1, D + 1, dtype=torch.float64) ** (-decay / 2)
    rows = torch.randn(TOKENS, D, generator=seeded(2), dtype=torch.float64)
    return rows * deviations @ directions.mT


def spread(latents: Tensor) -> float:
    """Energy of the largest latent over that of the median one."""
    energies = latents.square().sum(0)
    return float(energies.max() / energies.median())


def decibels(latents: Tensor, name: str) -> float:
    """Signal-to-noise ratio of what a codec with groups of 64 makes of latents."""
    sender, receiver = (
        build_codec(
            name,
            CodecEnd(
                role=Role.ACTIVATION,
                width=RANK,
                dtype=torch.float32,
                seed=0,
                settings=CodecSettings(group_size=64),
                sends=sends,
            ),
        )
        for sends in (True, False)
    )
    rows = latents.float()
    decoded = torch.full_like(rows, float("nan"))
    receiver.decode([sender.encode(rows, 0)], decoded, 0)
    noise = (decoded - rows).double()
    return float(10 * torch.log10(rows.double().square().sum() / noise.square().sum()))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_nearest_basis_mixes_what_eigenvectors_keep_apart(name: str) -> None:
    """It keeps the same energy and loses as little in a codec as a random basis of the space."""
    rows = residual(decay=1.0)
    v = leading_directions(second_moment(rows), RANK)
    apart = rows @ v
    mixed = rows @ nearest_basis(v, random_stiefel(D, RANK, seeded(3)))
    random = apart @ random_stiefel(RANK, RANK, seeded(4)).double()
    torch.testing.assert_close(mixed.square().sum(), apart.square().sum())
    assert spread(apart) > 50 and spread(mixed) < 4
    assert decibels(mixed, name) > decibels(apart, name) + 1.5
    assert decibels(mixed, name) == pytest.approx(decibels(random, name), abs=0.3)
