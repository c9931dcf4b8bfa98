# SPDX-License-Identifier: Apache-2.0
"""The bigram anchor: hashing, coordinates that are sums, gradients of both tables."""

import pytest
import torch
from torch import nn

from mapl.anchors import BigramAnchor, default_buckets
from mapl.boundary import decode, encode
from mapl.coordinates import Coordinates
from mapl.ngrams import bigram_buckets, predecessors_of
from mapl.projectors import LearnedProjector
from mapl.summed_coordinates import SummedCoordinates

V, D, RA, BUCKETS = 50, 12, 5, 31


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(dtype=torch.float64, buckets=BUCKETS):
    anchor = BigramAnchor(V, D, RA, buckets, seeded()).to(dtype)
    for number, table in enumerate((anchor.E, anchor.B)):
        nn.init.normal_(table, generator=seeded(number + 1))
    return anchor


def some_ids(shape=(7, 3)):
    return torch.randint(V, shape, generator=seeded(5), dtype=torch.int32)


def test_predecessors():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    assert predecessors_of(ids).tolist() == [[-1, -1], [1, 2], [3, 4]]
    assert predecessors_of(ids, torch.tensor([8, 9], dtype=torch.int32))[0].tolist() == [8, 9]
    halves = torch.cat([predecessors_of(ids[:2]), predecessors_of(ids[2:], ids[1])])
    assert torch.equal(halves, predecessors_of(ids))


def test_buckets_by_the_formula():
    ids, before = torch.tensor([0, 7, 128255]), torch.tensor([-1, 3, 128255])
    expected = [
        ((1640531527 * i + 1181783497 * (p + 1) + 971215073) % 2147483647) % 1000
        for i, p in zip(ids.tolist(), before.tolist(), strict=True)
    ]
    assert bigram_buckets(ids, before, 1000).tolist() == expected
    assert torch.equal(bigram_buckets(ids.int(), before.int(), 1000), torch.tensor(expected))


def test_buckets_are_filled_evenly_and_tell_order_apart():
    ids, before = torch.meshgrid(torch.arange(300), torch.arange(-1, 299), indexing="ij")
    found = bigram_buckets(ids, before, 1000)
    counts = torch.bincount(found.flatten(), minlength=1000).double()
    assert found.min() >= 0 and len(counts) == 1000
    assert counts.var().item() < 1.5 * 90  # 90 a bucket; thrown at random, their variance is 90
    pairs = bigram_buckets(ids, before, 2**30)
    assert (pairs != pairs.T).float().mean() > 0.99
    assert pairs.unique().numel() == pairs.numel()


@pytest.mark.parametrize(
    "predecessors", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int32), None]
)
def test_wrong_predecessors_are_refused(predecessors):
    with pytest.raises(ValueError, match="predecessors"):
        build().coordinates(torch.zeros(2, 3, dtype=torch.int32), predecessors)


def test_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1 bucket, got 0"):
        BigramAnchor(V, D, RA, 0, seeded())


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [(1, 4), (4096, 16384), (4097, 32768), (32000, 131072), (128256, 131072)],
)
def test_default_rows(vocabulary, rows):
    assert default_buckets(vocabulary) == rows


def test_starts_at_zero():
    anchor = BigramAnchor(V, D, RA, BUCKETS, seeded())
    assert not anchor.E.any() and not anchor.B.any() and anchor.B.shape == (BUCKETS, RA)


def test_coordinates_depend_on_two_tokens_alone():
    anchor, ids = build(), some_ids()
    c = anchor(ids, predecessors_of(ids)).gathered()
    buckets = bigram_buckets(ids, predecessors_of(ids), BUCKETS)
    assert torch.equal(c, anchor.E[ids.long()] + anchor.B[buckets])
    changed = ids.clone()
    changed[3] = (changed[3] + 1) % V
    differs = (anchor(changed, predecessors_of(changed)).gathered() != c).any(2)
    assert not differs[:3].any() and differs[3:5].all() and not differs[5:].any()


def through(anchor, ids, projector, x, z):
    """One stage: decoder and encoder with the same coordinates."""
    coordinates = anchor.coordinates(ids, predecessors_of(ids))
    out = decode(z, coordinates, anchor.basis, projector)
    return encode(x + out, coordinates, anchor.basis, projector), out


@pytest.mark.parametrize("shape", [(7, 3), (1, 1)])
def test_gradients_are_those_of_the_formula(shape):
    anchor, ids = build(), some_ids(shape)
    anchor.basis = anchor.basis.double()
    projector = LearnedProjector(D, 4, seeded(7))
    projector.A.data = projector.A.data.double()
    projector.grad = projector.grad.double()
    a, p = projector.A.detach(), anchor.basis
    x, z = (torch.randn(*shape, n, generator=seeded(n), dtype=torch.float64) for n in (D, 4))
    upstream = torch.randn(*shape, 4, generator=seeded(9), dtype=torch.float64)
    latent, out = through(anchor, ids, projector, x, z)
    ((latent * upstream).sum() + out.square().sum()).backward()
    found = anchor.E.grad, anchor.B.grad

    e, b = (t.detach().clone().requires_grad_() for t in (anchor.E, anchor.B))
    buckets = bigram_buckets(ids, predecessors_of(ids), BUCKETS)
    c = e[ids.long()] + b[buckets]
    out = z @ a.mT + c @ p
    (((x + out - c @ p) @ a * upstream).sum() + out.square().sum()).backward()
    assert e.grad.any() and b.grad.any()
    for ours, reference in zip(found, (e.grad, b.grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_gradients_of_either_use_alone():
    """Of what is decoded and encoded again at once, theirs cancel."""
    for use in ("decode", "encode"):
        anchor, ids = build(torch.float32), some_ids()
        projector = LearnedProjector(D, 4, seeded(7))
        coordinates = anchor.coordinates(ids, predecessors_of(ids))
        x, z = torch.randn(7, 3, D, generator=seeded(1)), torch.randn(7, 3, 4, generator=seeded(2))
        sign = 1.0
        if use == "decode":
            decode(z, coordinates, anchor.basis, projector).sum().backward()
            per_token = anchor.basis.sum(1)
        else:
            encode(x, coordinates, anchor.basis, projector).sum().backward()
            per_token, sign = (anchor.basis @ projector.A).sum(1), -1.0
        buckets = bigram_buckets(ids, predecessors_of(ids), BUCKETS).flatten()
        expected = torch.zeros_like(anchor.B).index_add_(
            0, buckets, (sign * per_token).expand(len(buckets), -1)
        )
        torch.testing.assert_close(anchor.B.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_go_to_main_grad_where_there_is_one():
    reference, ids = build(torch.float32), some_ids()
    projector = LearnedProjector(D, 4, seeded(7))
    x, z = torch.randn(7, 3, D, generator=seeded(1)), torch.randn(7, 3, 4, generator=seeded(2))
    latent, out = through(reference, ids, projector, x, z)
    (latent.square().sum() + out.sum()).backward()
    anchor = build(torch.float32)
    for table in (anchor.E, anchor.B):
        table.main_grad = torch.ones_like(table)
    for _ in range(2):
        latent, out = through(anchor, ids, projector, x, z)
        (latent.square().sum() + out.sum()).backward()
    for table, expected in ((anchor.E, reference.E.grad), (anchor.B, reference.B.grad)):
        assert table.grad_added_to_main_grad
        torch.testing.assert_close(table.main_grad, 1 + 2 * expected, rtol=1e-4, atol=1e-4)


def test_sums_need_one_shape_and_dtype():
    ids = some_ids()
    one = Coordinates(torch.zeros(V, RA), ids)
    with pytest.raises(ValueError, match="one shape and dtype"):
        SummedCoordinates([one, Coordinates(torch.zeros(V, RA + 1), ids)])
    with pytest.raises(ValueError, match="one shape and dtype"):
        SummedCoordinates([one, Coordinates(torch.zeros(V, RA, dtype=torch.bfloat16), ids)])
    with pytest.raises(ValueError, match="one shape and dtype"):
        SummedCoordinates([one, Coordinates(torch.zeros(V, RA), ids[1:])])


def test_no_gradient_is_prepared_without_one():
    anchor, ids = build(), some_ids()
    with torch.no_grad():
        coordinates = anchor.coordinates(ids, predecessors_of(ids))
    assert not coordinates.table.requires_grad
