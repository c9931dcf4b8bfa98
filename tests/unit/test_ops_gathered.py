# SPDX-License-Identifier: Apache-2.0
"""GEMMs with gathered rows: kernels against the formula in float64."""

import pytest
import torch

from mapl.ops import gathered
from mapl.ops.gathered_operands import GatheredOperands

# n, a, k, m: multiples of the tiles, and not.
SIZES = [
    (128, 64, 128, 256),
    (1, 1, 1, 1),
    (131, 67, 33, 17),
    (257, 130, 65, 300),
    (64, 16, 7, 512),
]
V = 50


@pytest.fixture(autouse=True)
def kernels(monkeypatch, poisoned):
    monkeypatch.setenv("MAPL_OPS", "triton")


def operands(size, dtype, device, stride=0):
    """Fresh ones in each run of the suite; few distinct ids, so that they repeat."""
    n, a, k, m = size
    left = torch.randn(n, a + stride, device=device).to(dtype)[:, :a]
    table = torch.randn(V, k, device=device).to(dtype)
    ids = torch.randint(0, V, (n,), device=device)
    weight = (torch.randn(a + k, m, device=device) / (a + k) ** 0.5).to(dtype)
    return GatheredOperands(left, table, ids, weight)


def relative_error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [0, 24])
def test_product_is_that_of_float64(size, dtype, stride, device):
    inputs = operands(size, dtype, device, stride)
    left, table, ids, weight = inputs
    exact = torch.cat([left.double(), table[ids].double()], 1) @ weight.double()
    result = gathered.gathered_mm(inputs)
    assert result.dtype == dtype and result.is_contiguous() and result.shape == exact.shape
    # A GPU rounds to the nearest, Triton's interpreter cuts bf16 off. Sums in 16 bits are worse.
    assert relative_error(result, exact) < torch.finfo(dtype).eps / (2 if left.is_cuda else 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_wide_results_go_through_operands_side_by_side(size, device, monkeypatch):
    monkeypatch.setattr(gathered, "KERNEL_COLUMNS", 0)
    inputs = operands(size, torch.bfloat16, device)
    left, table, ids, weight = inputs
    exact = torch.cat([left.double(), table[ids].double()], 1) @ weight.double()
    assert relative_error(gathered.gathered_mm(inputs), exact) < 2**-7


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [0, 24])
def test_side_by_side_is_exact(size, stride, device):
    from mapl.ops.kernels.side_by_side import side_by_side

    left, table, ids, _ = operands(size, torch.bfloat16, device, stride)
    expected = gathered.reference_side_by_side(left, table, ids)
    assert torch.equal(side_by_side(left, table, ids), expected)


def test_fp32_takes_the_reference(device):
    inputs = operands(SIZES[2], torch.float32, device)
    expected = gathered.reference_gathered_mm(inputs)
    assert torch.equal(gathered.gathered_mm(inputs), expected)


def test_rows_that_are_not_contiguous(device):
    inputs = operands(SIZES[2], torch.bfloat16, device)
    strided = inputs.left.T.contiguous().T
    assert strided.stride(1) != 1
    expected = gathered.gathered_mm(inputs)
    assert torch.equal(gathered.gathered_mm(inputs._replace(left=strided)), expected)


def test_same_bits_each_time(device):
    inputs = operands(SIZES[3], torch.bfloat16, device)
    assert torch.equal(gathered.gathered_mm(inputs), gathered.gathered_mm(inputs))
