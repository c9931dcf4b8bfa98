# SPDX-License-Identifier: Apache-2.0
"""How bytes travel changes no loss: split over ranks, received ahead, over an emulated link."""

import pytest
import torch

from cluster import Cluster
from layouts import HIDDEN, LAYOUTS, Layout
from mapl.traffic import KINDS
from test_layouts import RANK, assert_sides_equal

MAPL = f"--mapl-rank {RANK}"
TP4 = Layout(4, "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2")


@pytest.mark.parametrize(
    ("name", "depth"), [("pp2", 1), ("pp4", 2), ("bf16", 100), ("tp2-sp-pp2", 2)]
)
def test_receiving_ahead_changes_no_loss(cluster: Cluster, name: str, depth: int) -> None:
    layout = LAYOUTS[name]
    more = "--eval-interval 2 --eval-iters 3"
    waiting = cluster.run(layout.world_size, layout.command(MAPL, more, "--mapl-receive-ahead 0"))
    ahead = cluster.run(
        layout.world_size, layout.command(MAPL, more, f"--mapl-receive-ahead {depth}")
    )
    assert ahead.losses == waiting.losses
    assert ahead.validation == waiting.validation
    assert ahead.traffic["total"] == waiting.traffic["total"]


def test_receiving_ahead_is_the_default(cluster: Cluster) -> None:
    layout = LAYOUTS["pp2"]
    result = cluster.run(2, layout.command(MAPL), tamper="count_posted_receives")
    # Two receives are posted before the first payload is waited for.
    assert [record["posted_first"] for record in result.records] == [2, 2]
    off = cluster.run(
        2, layout.command(MAPL, "--mapl-receive-ahead 0"), tamper="count_posted_receives"
    )
    assert [record["posted_first"] for record in off.records] == [0, 0]


@pytest.mark.parametrize("codec", ["pipeline", "int8", "int4"])
def test_tensor_parallel_ranks_share_the_sending(cluster: Cluster, codec: str) -> None:
    """Each byte crosses once, and the losses are those of ranks that send all of it."""
    codecs = f"--mapl-forward-codec {codec} --mapl-backward-codec pipeline"
    whole = cluster.run(4, TP4.command(MAPL, codecs, "--mapl-no-tensor-parallel-split"))
    split = cluster.run(4, TP4.command(MAPL, codecs))
    one = cluster.run_once(2, LAYOUTS["pp2"].command(MAPL, codecs))
    assert split.losses == whole.losses
    assert_sides_equal(split, 1, 4)
    kinds = ("latents", "scales", "ids", "projector")
    sums = [[run.traffic["total"][kind] for kind in kinds] for run in (one, split, whole)]
    assert sums[1] == sums[0]
    assert sums[2] == [2 * size for size in sums[0][:3]] + [sums[0][3]]
    assert split.traffic["total"]["unsplit"] == pytest.approx(
        sum(whole.traffic["total"][kind] for kind in KINDS), rel=0.2
    )


def test_ranks_that_send_alike_round_alike(cluster: Cluster) -> None:
    """Without the split both tensor-parallel ranks hold the same gradients, drawn at random."""
    codecs = "--mapl-forward-codec rvq --mapl-rvq-codes 16 --mapl-backward-codec int4"
    result = cluster.run(4, TP4.command(MAPL, codecs, "--mapl-no-tensor-parallel-split"))
    assert_sides_equal(result, 1, 4)
    for stage in (0, 1):
        first, second = (record["anchors"] for record in result.records[2 * stage :][:2])
        for one, other in zip(first, second, strict=True):
            assert one["E"].abs().max() > 0
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_sequence_that_does_not_divide_is_not_split(cluster: Cluster) -> None:
    more = "--seq-length 31 --max-position-embeddings 31"
    result = cluster.run(4, TP4.command(MAPL, more))
    one = cluster.run(2, LAYOUTS["pp2"].command(MAPL, more))
    assert result.traffic["total"]["latents"] == 2 * one.traffic["total"]["latents"]


@pytest.mark.parametrize("name", ["pp2-dp2", "tp2-pp2", "tp2-sp-pp2", "pp4-vpp2"])
def test_the_exchange_in_bf16(cluster: Cluster, name: str) -> None:
    """Both sides round both terms alike, so they stay equal; the bytes are half."""
    layout = LAYOUTS[name]
    full = cluster.run_once(layout.world_size, layout.command(MAPL))
    half = cluster.run(layout.world_size, layout.command(MAPL, "--mapl-projector-exchange bf16"))
    boundaries = len(full.traffic["boundaries"])
    copies = sum(len(record["projectors"]) for record in half.records) // boundaries
    assert_sides_equal(half, boundaries, copies)
    assert 2 * half.traffic["total"]["projector"] == full.traffic["total"]["projector"]
    # Both ways, fp32, once a step, whatever the number of replicas.
    steps = 4
    assert full.traffic["total"]["projector"] == boundaries * steps * 2 * HIDDEN * RANK * 4
    assert half.losses == pytest.approx(full.losses, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "boundaries", "latency"), [("pp2-vpp2-overlapped", 3, 60), ("tp2-pp2", 1, 300)]
)
def test_an_emulated_network_changes_no_loss(
    cluster: Cluster, name: str, boundaries: int, latency: int
) -> None:
    layout = LAYOUTS[name]
    for flags, milliseconds in ((MAPL, latency), ("", 10)):  # plain Megatron too
        network = f"--mapl-emulate-latency {milliseconds} --mapl-emulate-bandwidth 4"
        fast = cluster.run_once(layout.world_size, layout.command(flags))
        slow = cluster.run(
            layout.world_size, layout.command(flags, network), tamper="count_emulated_sends"
        )
        # All processes send each step's micro-batches, forward, back, or both; and evaluate.
        assert all(record["emulated_sends"] >= 4 * layout.micro_batches for record in slow.records)
        assert slow.losses == fast.losses
        assert slow.validation == fast.validation
        if not flags:
            continue
        # The three steps after the first, which has the start-up in it, each cross all boundaries
        # to and fro. Without a network they take some 0.7 and 1.4 s on two quiet cores.
        assert slow.traffic["seconds"]["after_first_step"] >= 3 * 2 * boundaries * latency / 1000


@pytest.mark.parametrize(
    ("name", "flags", "tamper"),
    [
        ("pp4", "", "staged_transfers"),
        ("pp2", "", "unbatched_and_staged_transfers"),
        ("pp2-vpp2-overlapped", "", "staged_transfers"),
        ("pp4", f"{MAPL} --mapl-forward-codec rvq --mapl-rvq-codes 16", "staged_transfers"),
        ("pp4", f"{MAPL} --mapl-receive-ahead 0", "staged_transfers"),
        ("pp2-vpp2-overlapped", MAPL, "staged_transfers"),
        ("pp4-vpp2", MAPL, "staged_transfers"),
        ("pp2-dp2", MAPL, "staged_transfers"),
        ("pp4", f"{MAPL} --mapl-emulate-latency 5", "staged_transfers"),
        ("pp2-vpp2-overlapped", "--mapl-emulate-latency 5", "staged_transfers"),
    ],
)
def test_staged_transfers_change_no_loss(
    cluster: Cluster, name: str, flags: str, tamper: str
) -> None:
    layout = LAYOUTS[name]
    direct = cluster.run_once(layout.world_size, layout.command(flags))
    staged = cluster.run(layout.world_size, layout.command(flags), tamper=tamper)
    # Of each micro-batch a process sends one or more and receives as many.
    assert all(record["staged"] >= 4 * 2 * layout.micro_batches for record in staged.records)
    assert staged.losses == direct.losses
    assert staged.validation == direct.validation


def test_uncompressed_stages_through_the_payloads(cluster: Cluster) -> None:
    """Direct quantisation: no projector, no anchor, the codecs take the activations."""
    layout = LAYOUTS["pp2"]
    direct = f"--mapl-rank {HIDDEN} --mapl-projector none --mapl-anchor none"
    plain = cluster.run_once(2, layout.command(), plain=True)
    same = cluster.run(2, layout.command(direct))
    assert same.losses == plain.losses
    assert not any(record["projectors"] for record in same.records)
    int8 = cluster.run(
        2, layout.command(direct, "--mapl-forward-codec int8 --mapl-backward-codec int8")
    )
    assert int8.losses == pytest.approx(plain.losses, rel=5e-3)
    assert int8.losses != plain.losses
    assert int8.traffic["total"]["ratio"] == pytest.approx(4 / (1 + 2 / 64), rel=0.05)
    assert torch.tensor(int8.losses).isfinite().all()


@pytest.mark.parametrize(
    ("anchor", "rows"),
    [("factorized", 256), ("bigram --mapl-anchor-buckets 512", 256 + 512)],
    ids=["factorized", "bigram"],
)
def test_replicas_reduce_the_gradients_of_the_anchors(
    cluster: Cluster, anchor: str, rows: int
) -> None:
    """4 V r_a bytes a step and stage, with bigrams 4 (V + m) r_a: docs/choosing.md."""
    layout, rank, steps = LAYOUTS["pp2-dp2"], 16, 4
    reduced = [
        [
            record["reduced"]
            for record in cluster.run(
                4, layout.command(MAPL, anchors), tamper="count_reduced_bytes"
            ).records
        ]
        for anchors in (
            "--mapl-anchor none",
            f"--mapl-anchor {anchor} --mapl-anchor-rank {rank}",
        )
    ]
    assert min(reduced[0]) > 0
    for without, with_anchors in zip(*reduced, strict=True):
        assert with_anchors - without == steps * 4 * rows * rank
