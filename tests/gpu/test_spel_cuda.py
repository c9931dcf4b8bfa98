# SPDX-License-Identifier: Apache-2.0
"""The batched SPEL step on a GPU at full size: accuracy, bits, graphs, no wait for the device."""

import pytest
import torch

from mapl import projectors
from mapl.projectors import LearnedProjector
from mapl.spel import step_all
from mapl.stiefel import orthonormality_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

D, R = 4096, 256


def operands(count: int, d: int = D, r: int = R) -> tuple[list[torch.Tensor], ...]:
    """A, gradients and momenta; the gradients' singular values fall to 1e-2 of the first."""
    generator = torch.Generator("cuda").manual_seed(5)

    def normal() -> torch.Tensor:
        return torch.randn(d, r, device="cuda", generator=generator)

    decay = torch.logspace(0, -2, r, device="cuda")
    a = [torch.linalg.qr(normal().double()).Q.float().contiguous() for _ in range(count)]
    rotation = torch.linalg.qr(torch.randn(r, r, device="cuda", generator=generator)).Q
    grad = [(torch.linalg.qr(normal()).Q * decay) @ rotation for _ in range(count)]
    return a, [g.contiguous() for g in grad], [torch.zeros_like(matrix) for matrix in a]


def copies(batch: tuple[list[torch.Tensor], ...], indices: list[int]) -> list[list[torch.Tensor]]:
    return [[tensors[index].clone() for index in indices] for tensors in batch]


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("lr", [0.002, 0.1])
def test_agrees_with_float64(lr: float) -> None:
    batch = operands(2)
    for _ in range(3):
        a, grad, momentum = (tensors[1].double() for tensors in batch)
        inner = a.mT @ grad
        momentum = 0.9 * momentum + 0.1 * (grad - a @ (inner + inner.mT) / 2)
        exact = polar(a - lr * polar(momentum))
        assert all(step_all(*batch, lr))
        found = batch[0][1].double()
        assert (batch[2][1] - momentum).norm() < 1e-6 * momentum.norm()
        # Singular values of m reach 1e-2 of the largest, where fp32 knows D to about 1e-5.
        assert (found - exact).norm() < (2e-6 + 5e-5 * lr) * exact.norm()
        assert orthonormality_error(found) < 3e-6


def test_a_projector_moves_by_the_same_bits_in_any_batch() -> None:
    batch = operands(8)
    groups = [list(range(8)), [7, 3], [3], [0, 3, 5], [3, 3]]
    chosen = [copies(batch, group) for group in groups]
    for step in range(20):
        for part in chosen:
            assert all(step_all(*part, 0.02 if step % 2 else 0.1))
    for group, (a, _, momentum) in zip(groups, chosen, strict=True):
        for index, matrix, its_momentum in zip(group, a, momentum, strict=True):
            assert torch.equal(matrix, chosen[0][0][index]), (group, index)
            assert torch.equal(its_momentum, chosen[0][2][index]), (group, index)


def test_repeats_to_the_bit() -> None:
    batch = operands(8)
    first = copies(batch, list(range(8)))
    step_all(*first, 0.02)
    for _ in range(20):
        again = copies(batch, list(range(8)))
        step_all(*again, 0.02)
        assert all(torch.equal(x, y) for x, y in zip(first[0], again[0], strict=True))


@pytest.mark.parametrize(
    ("d", "r", "lr", "steps"), [(4096, 256, 0.1, 300), (517, 67, 0.02, 3000), (128, 128, 0.1, 1000)]
)
def test_stays_on_the_manifold(d: int, r: int, lr: float, steps: int) -> None:
    a, grad, momentum = operands(2, d, r)
    for _ in range(steps):
        for gradient in grad:
            gradient.normal_()
        step_all(a, grad, momentum, lr)
        worst = max(float(orthonormality_error(matrix.double())) for matrix in a)
        assert worst < 5e-6


def test_does_not_wait_for_the_device() -> None:
    boundaries = [LearnedProjector(D, R, torch.Generator().manual_seed(i)).cuda() for i in range(2)]
    boundaries.append(LearnedProjector(D, 128, torch.Generator().manual_seed(2)).cuda())
    for projector in boundaries:
        projector.accumulate(torch.randn_like(projector.A))
    boundaries[1].grad[0, 0] = float("nan")
    projectors.step_all(boundaries, 0.01)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ok = projectors.step_all(boundaries, 0.01)
        projectors.step_all(boundaries[1:], 0.01)  # another batch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [bool(one) for one in ok] == [True, False, True]
    assert [int(projector.skipped_steps) for projector in boundaries] == [0, 3, 0]


@pytest.mark.parametrize("by_tensor", [True, False])
def test_is_captured_in_a_graph(by_tensor: bool) -> None:
    """A learning rate given as a tensor is read at each replay; one given as a number is baked."""
    batch = operands(3, 1024, 128)
    eager, captured = copies(batch, [0, 1, 2]), copies(batch, [0, 1, 2])
    lr = torch.full((), 0.05, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        step_all(*copies(batch, [0, 1, 2]), 0.05)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ok = step_all(*captured, lr if by_tensor else 0.05)
    for rate in (0.02, 0.05, 0.1):
        gradients = [torch.randn_like(gradient) for gradient in eager[1]]
        if rate == 0.05:
            gradients[1][3, 3] = float("inf")
        for part in (eager, captured):
            for gradient, fresh in zip(part[1], gradients, strict=True):
                gradient.copy_(fresh)
        lr.fill_(rate)
        graph.replay()
        expected = step_all(*eager, rate if by_tensor else 0.05)
        assert [bool(one) for one in ok] == [bool(one) for one in expected]
        for kind in (0, 2):
            for x, y in zip(eager[kind], captured[kind], strict=True):
                assert torch.equal(x, y)
