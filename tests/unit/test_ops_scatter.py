# SPDX-License-Identifier: Apache-2.0
"""Adding tokens' rows to a table: kernels against float64, and the same bits each time."""

import pytest
import torch

from mapl.coordinates import Coordinates
from mapl.ops.scatter import TokenOrder, reference_scatter_add, scatter_add

V = 300

#: Runs of equal ids within a chunk of 32 tokens, over its ends, and over many chunks.
IDS = {
    "one token": torch.tensor([7]),
    "all alike": torch.full((161,), V - 1),
    "one chunk of one": torch.tensor([5] * 32 + [6] * 32),
    "over an end": torch.tensor([1] * 20 + [2] * 20 + [3] * 60 + [4]),
    "all different": torch.arange(100),
    "few, mixed": torch.arange(200) * 7 % 5,
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch, poisoned):
    monkeypatch.setenv("MAPL_OPS", "triton")


def test_rows_that_are_not_contiguous(device):
    ids = torch.tensor([2, 0, 2], device=device)
    rows = torch.randn(7, 3, device=device).T
    totals = torch.zeros(2, 4, 7, device=device)
    scatter_add(totals[0], TokenOrder(ids), rows)
    scatter_add(totals[1], TokenOrder(ids), rows[:1].expand(3, 7).T.contiguous().T)
    torch.testing.assert_close(totals[0, 2], rows[0] + rows[2])
    torch.testing.assert_close(totals[1, 2], 2 * rows[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_that_are_a_slice(dtype, device):
    ids = torch.arange(80, dtype=dtype, device=device)[::2]
    table = torch.randn(80, 16, device=device).requires_grad_()
    coordinates = Coordinates(table, ids[:, None])
    torch.testing.assert_close(coordinates.rows(), table[::2].detach())
    dc = torch.randn(40, 16, device=device)
    gradient = coordinates.table_gradient(table, dc, adds=False, last=True)
    torch.testing.assert_close(gradient[::2], dc)
    assert not gradient[1::2].any()
    assert coordinates.ids.is_contiguous()


def common_and_rare(n):
    """As in text: some ids often, most of them hardly ever."""
    return (torch.rand(n) ** 4 * V).long()


@pytest.mark.parametrize("case", [*IDS, "like text"])
@pytest.mark.parametrize("k", [1, 33, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_those_of_float64(case, k, dtype, device):
    ids = IDS[case] if case in IDS else common_and_rare(500)
    ids = ids[torch.randperm(len(ids))].to(device)
    rows = torch.randn(len(ids), k + 5, device=device).to(dtype)[:, :k]
    more = torch.randn(len(ids), k, device=device).to(dtype) if k > 1 else None
    total = torch.randn(V, k, device=device)
    exact = total.double().index_add_(0, ids, rows.double())
    if more is not None:
        exact.index_add_(0, ids, more.double())
    untouched = torch.ones(V, dtype=torch.bool).index_fill_(0, ids.cpu(), False)
    before, reference = total.clone(), total.clone()
    reference_scatter_add(reference, ids, rows, more)
    scatter_add(total, TokenOrder(ids), rows, more)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(reference.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(total[untouched], before[untouched])


@pytest.mark.parametrize("forced", ["triton", "reference"])
def test_a_narrow_total_is_rounded_once(forced, device, monkeypatch):
    monkeypatch.setenv("MAPL_OPS", forced)
    ids = torch.zeros(400, dtype=torch.int64, device=device)
    total = torch.ones(1, 8, dtype=torch.bfloat16, device=device)
    # Each alone is lost beside 1 in bf16.
    scatter_add(total, TokenOrder(ids), torch.full((400, 8), 2.0**-9, device=device))
    assert torch.equal(total, torch.full_like(total, 1 + 400 * 2.0**-9))


def test_same_bits_each_time(device):
    ids = common_and_rare(500).to(device)
    rows = torch.randn(500, 64, device=device)
    results = []
    for _ in range(2):
        total = torch.zeros(V, 64, device=device)
        scatter_add(total, TokenOrder(ids), rows)
        results.append(total)
    assert torch.equal(*results)


@pytest.mark.parametrize("case", [*IDS, "like text"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("few", [0, 10**6])
def test_order_is_that_of_a_stable_sort(case, dtype, few, device, monkeypatch):
    monkeypatch.setattr("mapl.ops.scatter._FEW", few)
    ids = IDS[case] if case in IDS else common_and_rare(1100)
    ids = ids[torch.randperm(len(ids))].to(device, dtype)
    ids[0] = 2**31 - 1
    order = TokenOrder(ids)
    order.start()
    expected = ids.sort(stable=True)
    for found, due in zip(order.ascending, expected, strict=True):
        assert torch.equal(found.long(), due.long())


def test_ids_are_sorted_once(device):
    order = TokenOrder(torch.tensor([3, 1, 3, 0], device=device))
    ids, places = order.ascending
    assert ids.tolist() == [0, 1, 3, 3] and places.tolist() == [3, 1, 0, 2]
    assert order.ascending[0] is ids
