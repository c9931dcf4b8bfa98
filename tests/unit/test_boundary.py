# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder: values, every gradient, memory, and what is measured about them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mapl import operands
from mapl.anchors import build_anchor
from mapl.boundary import decode, encode, energy_kept, principal_angles
from mapl.coordinates import Coordinates
from mapl.projectors import PROJECTORS, FixedProjector, LearnedProjector
from mapl.stiefel import random_stiefel

V = 11
KINDS = ["none", "factorized", "static", "full"]
#: Kernels run here on the CPU; where a GPU keeps them from it, test_ops_*.py runs them on that.
OPS = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]
# s, b, d, r, anchor rank
SIZES = [(4, 2, 12, 5, 7), (3, 1, 8, 1, 1), (2, 3, 6, 6, 6), (5, 1, 9, 9, 1), (1, 1, 7, 2, 7)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def make_projector(d, r, kind="learned", dtype=torch.float64):
    projector = PROJECTORS[kind](d, r, seeded(3))
    if dtype == torch.float64:
        projector.A = nn.Parameter(projector.A.double(), requires_grad=False)
        if projector.learns:
            projector.grad = torch.zeros_like(projector.A)
    return projector


class Case:
    """One boundary side with filled tables, and the same mathematics written d wide."""

    def __init__(self, size, kind, projector="learned", dtype=torch.float64):
        self.s, self.b, self.d, self.r, rank = size
        self.projector = make_projector(self.d, self.r, projector, dtype)
        self.anchor = build_anchor(
            kind, vocab_size=V, hidden_size=self.d, anchor_rank=rank, generator=seeded(4)
        ).to(dtype)
        if hasattr(self.anchor, "E"):
            nn.init.normal_(self.anchor.E, generator=seeded(5))
        # Few distinct ids, so that most of them repeat.
        self.ids = torch.randint(3, (self.s, self.b), generator=seeded(6)).to(torch.uint16)
        self.x = normal(self.s, self.b, self.d, seed=7, dtype=dtype)
        self.z = normal(self.s, self.b, self.r, seed=8, dtype=dtype)

    def coordinates(self):
        return self.anchor.coordinates(self.ids)

    def encode(self, x, coordinates=None):
        coordinates = self.coordinates() if coordinates is None else coordinates
        return encode(x, coordinates, self.anchor.basis, self.projector)

    def decode(self, z, coordinates=None):
        coordinates = self.coordinates() if coordinates is None else coordinates
        return decode(z, coordinates, self.anchor.basis, self.projector)

    def wide_anchor(self, dtype=torch.float64):
        coordinates = self.anchor(self.ids)
        if coordinates is None:
            return torch.zeros(self.s, self.b, self.d, dtype=dtype)
        coordinates, basis = coordinates.gathered(), self.anchor.basis
        return coordinates.to(dtype) if basis is None else coordinates.to(dtype) @ basis.to(dtype)

    def table_gradient(self):
        """The gradient of E since the last call, or None."""
        table = getattr(self.anchor, "E", None)
        if table is None:
            return None
        gradient, table.grad = table.grad, None
        return gradient


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_encode_equals_autograd_of_the_wide_formula(size, kind):
    case = Case(size, kind)
    dz = normal(case.s, case.b, case.r, seed=9)
    x = case.x.clone().requires_grad_()
    z = case.encode(x)
    z.backward(dz)
    gradients = x.grad, case.projector.grad, case.table_gradient()

    x = case.x.clone().requires_grad_()
    a = case.projector.A.detach().clone().requires_grad_()
    expected = (x - case.wide_anchor()) @ a
    expected.backward(dz)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(gradients, (x.grad, a.grad, case.table_gradient()))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_autograd_of_the_wide_formula(size, kind):
    case = Case(size, kind)
    dx = normal(case.s, case.b, case.d, seed=9)
    z = case.z.clone().requires_grad_()
    x = case.decode(z)
    x.backward(dx)
    gradients = z.grad, case.projector.grad, case.table_gradient()

    z = case.z.clone().requires_grad_()
    a = case.projector.A.detach().clone().requires_grad_()
    expected = z @ a.mT + case.wide_anchor()
    expected.backward(dx)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(gradients, (z.grad, a.grad, case.table_gradient()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_gradients_against_finite_differences(size, kind, direction):
    case = Case(size, kind)
    call = getattr(case, direction)
    start = (case.x if direction == "encode" else case.z).clone().requires_grad_()
    coordinates = case.anchor(case.ids)
    if coordinates is None:
        assert torch.autograd.gradcheck(call, (start,))
    else:
        inputs = (start, coordinates.gathered().detach().requires_grad_())
        assert torch.autograd.gradcheck(lambda x, c: call(x, Coordinates.of(c)), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_projector_gradient_against_finite_differences(kind, direction):
    case = Case((3, 2, 6, 4, 3), kind)
    call = getattr(case, direction)
    start = (case.x if direction == "encode" else case.z).clone().requires_grad_()
    weight = normal(*call(start).shape, seed=10)
    call(start).backward(weight)
    numeric = torch.empty_like(case.projector.A)
    a, h = case.projector.A, 1e-6
    for i in range(a.size(0)):
        for j in range(a.size(1)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    a[i, j] += sign * h
                    ends.append((call(start) * weight).sum())
                    a[i, j] -= sign * h
            numeric[i, j] = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(case.projector.grad, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_boundary_give_the_whole_gradient(kind):
    sender, receiver = Case(SIZES[0], kind), Case(SIZES[0], kind)
    weight = normal(*sender.x.shape, seed=10)
    z = sender.encode(sender.x.requires_grad_())
    received = z.detach().requires_grad_()
    receiver.decode(received).backward(weight)
    z.backward(received.grad)
    a = sender.projector.A.detach().clone().requires_grad_()
    anchor = sender.wide_anchor().detach()
    ((sender.x.detach() - anchor) @ a @ a.mT + anchor).backward(weight)
    torch.testing.assert_close(sender.projector.grad + receiver.projector.grad, a.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_projector_gradient_of_a_16_bit_model_is_fp32(kind, dtype, precision, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision(precision)
    case = Case((16, 4, 32, 8, 12), kind, dtype=dtype)
    assert case.projector.A.dtype == torch.float32
    anchor = case.wide_anchor().detach()
    dz = normal(16, 4, 8, seed=9, dtype=dtype)
    z = case.encode(case.x.requires_grad_())
    z.backward(dz)
    assert z.dtype == case.x.grad.dtype == dtype and case.projector.grad.dtype == torch.float32
    expected = torch.einsum("sbd,sbr->dr", case.x.double() - anchor, dz.double())
    error = (case.projector.grad.double() - expected).norm() / expected.norm()
    assert error < 1e-6

    case.projector.zero_grad()
    dx = normal(16, 4, 32, seed=10, dtype=dtype)
    z = case.z.requires_grad_()
    x = case.decode(z)
    x.backward(dx)
    assert x.dtype == z.grad.dtype == dtype and case.projector.grad.dtype == torch.float32
    expected = torch.einsum("sbd,sbr->dr", dx.double(), z.double())
    error = (case.projector.grad.double() - expected).norm() / expected.norm()
    assert error < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_in_the_dtype_of_the_model(kind, dtype):
    case = Case((16, 4, 32, 8, 12), kind, dtype=dtype)
    anchor, a = case.wide_anchor(), case.projector.A.double()
    # A handful of roundings, of operands that are up to a few times larger than the result.
    tolerance = 8 * torch.finfo(dtype).eps
    for result, expected in (
        (case.encode(case.x), (case.x.double() - anchor) @ a),
        (case.decode(case.z), case.z.double() @ a.mT + anchor),
    ):
        assert (result.double() - expected).norm() / expected.norm() < tolerance


def test_coordinates_of_another_dtype_get_their_own_gradient():
    case = Case(SIZES[0], "factorized", dtype=torch.float32)
    x = case.x.bfloat16().requires_grad_()
    coordinates = case.anchor(case.ids).gathered().detach().requires_grad_()
    case.encode(x, Coordinates.of(coordinates)).sum().backward()
    assert coordinates.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


def test_a_model_cast_to_bf16_keeps_the_projector_and_basis():
    case = Case(SIZES[0], "factorized", dtype=torch.float32)
    a, basis = case.projector.A.clone(), case.anchor.basis.clone()
    nn.ModuleList([case.projector, case.anchor]).bfloat16()
    assert torch.equal(case.projector.A, a) and torch.equal(case.anchor.basis, basis)
    assert case.anchor.E.dtype == torch.bfloat16
    assert case.encode(case.x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_latent_may_be_freed_once_sent(kind):
    case = Case(SIZES[0], kind)
    dz = normal(case.s, case.b, case.r, seed=9)
    kept_x, freed_x = case.x.clone().requires_grad_(), case.x.clone().requires_grad_()
    case.encode(kept_x).backward(dz)
    expected = case.projector.grad.clone()
    case.projector.zero_grad()
    z = case.encode(freed_x)
    assert z._base is None and z.is_contiguous() and z.requires_grad
    # As Megatron frees an output tensor: one element left, and the autograd engine called directly.
    z.data = torch.full((1,), float("nan"), dtype=z.dtype)
    torch.autograd.Variable._execution_engine.run_backward(
        (z,), (dz,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    torch.testing.assert_close(freed_x.grad, kept_x.grad)
    torch.testing.assert_close(case.projector.grad, expected)


@pytest.mark.parametrize("kind", ["factorized", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ops", OPS)
def test_gradients_go_to_main_grad_where_there_is_one(kind, dtype, ops, monkeypatch):
    """As under Megatron's DDP: a stage's decoder and encoder share the table and the tokens."""
    monkeypatch.setenv("MAPL_OPS", ops)

    def step(case):
        coordinates = case.coordinates()
        with torch.no_grad():  # an evaluation is no use that a backward pass will come to
            case.decode(case.z, coordinates)
        x = case.decode(case.z.clone().requires_grad_(), coordinates)
        layers = normal(*x.shape, seed=12, dtype=x.dtype)  # else both gradients cancel
        case.encode(x * layers, coordinates).sum().backward()

    plain = Case((8, 2, 12, 5, 7), kind, dtype=torch.float64)
    step(plain)
    case = Case((8, 2, 12, 5, 7), kind, dtype=dtype)
    table = case.anchor.E
    table.main_grad, table.grad_added_to_main_grad = torch.ones(table.shape), False
    told = []
    table.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.shape))
    step(case)
    assert table.grad_added_to_main_grad and told == [table.shape]
    added = (table.main_grad - 1).double()
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 4e-2}[dtype]
    assert (added - plain.anchor.E.grad).norm() < tolerance * plain.anchor.E.grad.norm()


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_uses_in_two_dtypes_are_refused(dtypes):
    decoding, encoding = (getattr(torch, name) for name in dtypes)
    case = Case(SIZES[0], "factorized", dtype=torch.bfloat16)
    case.anchor.E.main_grad = torch.zeros(case.anchor.E.shape)
    coordinates = case.coordinates()
    case.decode(case.z.to(decoding).requires_grad_(), coordinates)
    with pytest.raises(RuntimeError, match="one dtype for both"):
        case.encode(case.x.to(encoding).requires_grad_(), coordinates)


def test_a_gradient_that_would_be_lost_is_refused():
    case = Case(SIZES[0], "factorized")
    case.anchor.E.main_grad = torch.zeros(case.anchor.E.shape)
    with pytest.raises(RuntimeError, match="main_grad"):
        case.anchor(case.ids).gathered()
    with torch.no_grad():
        assert case.anchor(case.ids).gathered() is not None


@pytest.mark.parametrize("kind", ["factorized", "full"])
@pytest.mark.parametrize("ops", OPS)
def test_expanded_gradients_and_transposed_inputs(kind, ops, monkeypatch):
    monkeypatch.setenv("MAPL_OPS", ops)
    case = Case(SIZES[0], kind, dtype=torch.bfloat16)
    x = case.x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    case.encode(x).sum().backward()
    case.decode(case.z.requires_grad_()).sum().backward()
    exact = Case(SIZES[0], kind)
    exact.x, exact.z = case.x.detach().double(), case.z.detach().double()
    with torch.no_grad():
        exact.anchor.E.copy_(case.anchor.E)
    exact.encode(exact.x.requires_grad_()).sum().backward()
    exact.decode(exact.z.requires_grad_()).sum().backward()
    for got, expected in (
        (x.grad, exact.x.grad),
        (case.z.grad, exact.z.grad),
        (case.anchor.E.grad, exact.anchor.E.grad),
        (case.projector.grad, exact.projector.grad),
    ):
        assert (got.double() - expected).norm() < 0.03 * expected.norm()


def test_operands_are_formed_once_for_an_a(monkeypatch):
    formed = []
    form = operands._form
    monkeypatch.setattr(operands, "_form", lambda *args: formed.append(args[0]) or form(*args))
    case = Case(SIZES[0], "factorized", dtype=torch.float32)
    for _ in range(3):
        case.encode(case.x), case.decode(case.z)
    assert formed == ["encode", "decode"]


def test_operands_follow_the_projector():
    case = Case(SIZES[0], "factorized", dtype=torch.float32)
    case.encode(case.x), case.decode(case.z)
    for change in (
        lambda: case.projector.step(0.1),
        lambda: case.projector.load_state_dict(case.projector.state_dict()),
        lambda: (  # behind autograd's back, as a collective may, but not within a step
            case.projector.zero_grad(),
            case.projector.A.data.copy_(random_stiefel(case.d, case.r, seeded(8))),
        ),
    ):
        case.projector.accumulate(normal(case.d, case.r, seed=11, dtype=torch.float32))
        change()
        a, anchor = case.projector.A, case.wide_anchor(torch.float32)
        torch.testing.assert_close(case.encode(case.x), (case.x - anchor) @ a)
        torch.testing.assert_close(case.decode(case.z), case.z @ a.mT + anchor)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_mutated(kind):
    case = Case(SIZES[0], kind)
    coordinates = case.anchor(case.ids)
    tensors = [case.x, case.z, case.projector.A.data, *case.anchor.state_dict().values()]
    if coordinates is not None:
        tensors.append(coordinates.gathered())
    before = [t.detach().clone() for t in tensors]
    for call, start in ((case.encode, case.x), (case.decode, case.z)):
        given = coordinates and Coordinates.of(coordinates.gathered().detach())
        call(start.requires_grad_(), given).sum().backward()
        call(start).sum().backward()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_strided_inputs_and_expanded_gradients():
    case = Case(SIZES[0], "factorized")
    strided = case.x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    z = case.encode(strided)
    z.sum().backward()
    torch.testing.assert_close(z, case.encode(case.x))
    torch.testing.assert_close(strided.grad, case.projector.A.sum(1).expand(case.s, case.b, case.d))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_projector_forms_no_gradient_and_keeps_no_activation(kind):
    case = Case(SIZES[0], kind, projector="fixed")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = encode(case.x.requires_grad_(), case.coordinates(), case.anchor.basis, case.projector)
        x = decode(case.z.requires_grad_(), case.coordinates(), case.anchor.basis, case.projector)
    kept = {t.data_ptr() for t in saved}
    assert case.x.data_ptr() not in kept and case.z.data_ptr() not in kept
    z.sum().backward()
    x.sum().backward()
    assert isinstance(case.projector, FixedProjector) and case.projector.grad is None
    torch.testing.assert_close(case.x.grad, case.projector.A.sum(1).expand(case.s, case.b, case.d))


def test_moving_a_between_forward_and_backward_is_an_error():
    case = Case(SIZES[0], "none", dtype=torch.float32)
    z = case.encode(case.x.requires_grad_())
    case.projector.accumulate(torch.ones_like(case.projector.A))
    case.projector.step(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


class WideAllocations(TorchDispatchMode):
    """Counts the storages of a given number of elements that operations bring into being."""

    def __init__(self, elements, known):
        super().__init__()
        self.elements = elements
        self.storages = {t.untyped_storage()._cdata for t in known}
        self.keep_alive = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.keep_alive.append(tensor)
        return out


def test_no_wide_anchor_is_written_to_memory():
    case = Case((64, 2, 32, 4, 8), "factorized", dtype=torch.float32)
    wide = 64 * 2 * 32
    x, z = case.x.requires_grad_(), case.z.requires_grad_()
    dx, dz = torch.randn_like(case.x), torch.randn_like(case.z)
    with WideAllocations(wide, [x, dx]) as encode_forward:
        latent = case.encode(x)
    with WideAllocations(wide, [x, dx]) as encode_backward:
        latent.backward(dz)
    with WideAllocations(wide, [x, dx]) as decode_forward:
        activation = case.decode(z)
    with WideAllocations(wide, [x, dx, activation]) as decode_backward:
        activation.backward(dx)
    with WideAllocations(wide, [x]) as energy:
        energy_kept(x, case.coordinates(), case.anchor.basis, case.projector)
    # Only dX and X̂ are allowed to be d wide.
    counts = [
        len(mode.keep_alive)
        for mode in (encode_forward, encode_backward, decode_forward, decode_backward, energy)
    ]
    assert counts == [0, 1, 1, 0, 0]


def test_wide_allocations_are_seen():
    case = Case((64, 2, 32, 4, 8), "factorized", dtype=torch.float32)
    with WideAllocations(64 * 2 * 32, [case.x]) as mode:
        (case.x - case.wide_anchor(torch.float32)) @ case.projector.A
    assert len(mode.keep_alive) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_energy_kept(size, kind, projector):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = Case(size, kind, projector, dtype)
        if kind == "factorized" and dtype == torch.float64:
            # The formula needs rows that are orthonormal to the precision asked of it.
            case.anchor.basis = torch.linalg.qr(case.anchor.basis.double().mT).Q.mT
        residual = case.x.double() - case.wide_anchor()
        expected = (residual @ case.projector.A.double()).square().sum() / residual.square().sum()
        kept = energy_kept(case.x, case.coordinates(), case.anchor.basis, case.projector)
        assert kept.ndim == 0 and not kept.requires_grad and kept.dtype == dtype
        assert kept.item() == pytest.approx(expected.item(), rel=tolerance)


def test_energy_kept_of_a_16_bit_model_is_fp32():
    case = Case((16, 4, 32, 8, 12), "factorized", dtype=torch.bfloat16)
    residual = case.x.double() - case.wide_anchor()
    expected = (residual @ case.projector.A.double()).square().sum() / residual.square().sum()
    kept = energy_kept(case.x, case.coordinates(), case.anchor.basis, case.projector)
    assert kept.dtype == torch.float32 and kept.item() == pytest.approx(expected.item(), rel=1e-5)


def test_energy_kept_of_known_subspaces():
    projector = LearnedProjector(12, 4, seeded(3))
    inside = normal(5, 2, 4, dtype=torch.float32) @ projector.A.mT
    assert energy_kept(inside, None, None, projector).item() == pytest.approx(1.0, abs=1e-6)
    outside = normal(5, 2, 12, dtype=torch.float32)
    outside = outside - outside @ projector.A @ projector.A.mT
    assert energy_kept(outside, None, None, projector).item() < 1e-10
    assert energy_kept(torch.zeros(5, 2, 12), None, None, projector) == 1.0


def test_principal_angles_of_known_subspaces():
    theta = torch.deg2rad(torch.tensor([10.0, 53.0]))
    a = torch.eye(6, 2)
    b = torch.zeros(6, 2)
    b[0, 0], b[1, 1] = theta.cos()
    b[2, 0], b[3, 1] = theta.sin()
    torch.testing.assert_close(
        principal_angles(a, b), torch.tensor([10.0, 53.0]), rtol=0, atol=1e-4
    )
    rotation = random_stiefel(2, 2, seeded())
    torch.testing.assert_close(
        principal_angles(a @ rotation, b), torch.tensor([10.0, 53.0]), rtol=0, atol=1e-3
    )
    assert principal_angles(a, a @ rotation).max() < 0.05
    assert torch.equal(principal_angles(a, torch.eye(6)[:, 2:5]), torch.full((2,), 90.0))
    with pytest.raises(ValueError, match="equally many rows"):
        principal_angles(a, torch.eye(5, 2))


@pytest.mark.parametrize(
    "call,tensor,coordinates,basis,match",
    [
        (encode, (3, 2, 7), None, None, r"encode's x must be \[..., 8\]"),
        (encode, (8,), None, None, r"\[..., 8\]"),
        (decode, (3, 2, 8), None, None, r"decode's z must be \[..., 4\]"),
        (energy_kept, (3, 2, 4), None, None, "energy_kept's x"),
        (encode, (3, 2, 8), (3, 1, 5), (5, 8), "micro-batch"),
        (encode, (3, 2, 8), (2, 3, 5), (5, 8), "micro-batch"),
        (encode, (3, 2, 8), (3, 2, 6), (5, 8), r"\(3, 2, 5\)"),
        (encode, (3, 2, 8), (3, 2, 5), None, r"\(3, 2, 8\)"),
        (decode, (3, 2, 4), (6, 5), (5, 8), r"\(3, 2, 5\)"),
        (decode, (3, 2, 4), (3, 2, 5), (5, 7), r"basis must be \[k, 8\]"),
        (decode, (3, 2, 4), None, (5, 8), "pass both"),
    ],
)
def test_shape_errors(call, tensor, coordinates, basis, match):
    projector = LearnedProjector(8, 4, seeded())
    anchors = [
        None if coordinates is None else Coordinates.of(torch.zeros(coordinates)),
        None if basis is None else torch.zeros(basis),
    ]
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(tensor), *anchors, projector)
