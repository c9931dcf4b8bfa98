# SPDX-License-Identifier: Apache-2.0
"""A square orthogonal projector over the byte wire must train exactly as plain Megatron does."""

import pytest

from cluster import Cluster
from layouts import HIDDEN, LAYOUTS

#: A and Aᵀ round once each in the model's dtype, so half precision agrees to fewer digits.
TOLERANCE = {"bf16": 2e-3, "fp16": 2e-3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_square_projector_equals_plain_megatron(cluster: Cluster, name: str) -> None:
    layout = LAYOUTS[name]
    plain = cluster.run_once(layout.world_size, layout.command(), plain=True)
    mapl = cluster.run(
        layout.world_size, layout.command(f"--mapl-rank {HIDDEN} --mapl-anchor none")
    )
    assert len(plain.losses) >= 4
    tolerance = TOLERANCE.get(name, 1e-6)
    assert mapl.losses == pytest.approx(plain.losses, rel=tolerance)
    assert mapl.validation == pytest.approx(plain.validation, rel=tolerance)
    assert plain.losses[-1] < plain.losses[0] - 0.05  # it trained


@pytest.mark.parametrize("name", ["pp2", "tp2-sp-pp2", "moe-ep2", "mtp", "bf16"])
def test_without_the_flag_it_is_plain_megatron(cluster: Cluster, name: str) -> None:
    """Digit for digit: every bit of every loss."""
    layout = LAYOUTS[name]
    plain = cluster.run_once(layout.world_size, layout.command(), plain=True)
    ours = cluster.run_once(layout.world_size, layout.command())
    assert ours.losses == plain.losses
    assert ours.validation == plain.validation


def test_unbatched_transfers_of_two_stages(cluster: Cluster) -> None:
    """Megatron then sends one of the two directions over the group of all processes."""
    layout = LAYOUTS["pp2"]
    plain = cluster.run_once(2, layout.command(), plain=True)
    mapl = cluster.run(
        2,
        layout.command(f"--mapl-rank {HIDDEN} --mapl-anchor none"),
        tamper="unbatched_transfers",
    )
    assert mapl.losses == pytest.approx(plain.losses, rel=1e-6)
