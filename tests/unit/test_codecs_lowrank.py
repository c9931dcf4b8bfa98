# SPDX-License-Identifier: Apache-2.0
"""What gradients of low rank do alone; tests/unit/test_codecs.py has what all codecs do."""

import math

import pytest
import torch
from torch import Tensor

from mapl.codecs import CodecEnd, CodecSettings, LowRankCodec, Role, build_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Largest relative error of rounding a number, and a few more for the arithmetic.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(40, 24, 5), (9, 33, 9), (64, 8, 8), (1, 7, 1), (130, 96, 16)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(width: int, columns: int | None, dtype: torch.dtype, *, sends=True, seed=3):
    codec = build_codec(
        "lowrank",
        CodecEnd(
            role=Role.GRADIENT,
            width=width,
            dtype=dtype,
            seed=seed,
            settings=CodecSettings(lowrank_q=columns),
            sends=sends,
        ),
    )
    assert isinstance(codec, LowRankCodec)
    return codec


def gradients(count: int, rows: int, width: int, dtype: torch.dtype, rank: int = 0) -> list[Tensor]:
    """Gaussian ones; of `rank`, if given, with the same rows' space."""
    generator = torch.Generator().manual_seed(rows + width)
    if not rank:
        made = torch.randn(count, rows, width, generator=generator)
    else:
        space = torch.randn(rank, width, generator=generator)
        made = torch.randn(count, rows, rank, generator=generator) @ space
    return list((made * 0.01).to(dtype))


def there_and_back(codec: LowRankCodec, rows: Tensor, number: int = 0) -> Tensor:
    """Decoded by a receiver of its own, which needs no state."""
    receiver = build(codec.width, codec.columns, rows.dtype, sends=False)
    out = torch.full_like(rows, 7.0)
    receiver.decode([codec.encode(rows, number)], out, number)
    return out


def power_sgd(grads: list[Tensor], start: Tensor) -> list[Tensor]:
    """PowerSGD with error feedback as its paper writes it, with Gram–Schmidt, in fp64."""
    error, guess, decoded = torch.zeros_like(grads[0], dtype=torch.float64), start.double(), []
    for gradient in grads:
        total = gradient.double() + error
        left = total @ guess
        for column in range(left.shape[1]):
            for _ in range(2):  # twice is enough
                before = left[:, :column]
                left[:, column] -= before @ (before.T @ left[:, column])
            left[:, column] /= left[:, column].norm()
        guess = total.T @ left
        decoded.append(left @ guess.T)
        error = total - decoded[-1]
    return decoded


@every_dtype
@every_shape
def test_equals_power_sgd_with_error_feedback(dtype, shape):
    rows, width, columns = shape
    codec = build(width, columns, dtype)
    grads = gradients(6, rows, width, dtype)
    expected = power_sgd(grads, codec.Q)
    for number, (gradient, reference) in enumerate(zip(grads, expected, strict=True)):
        error = there_and_back(codec, gradient, number).double() - reference
        # Each payload starts from what the roundings of the last one left.
        assert error.norm() < (number + 1) * 2 * ROUNDING[dtype] * reference.norm()


def test_without_error_feedback_it_would_be_something_else():
    """So the test above can tell."""
    codec = build(24, 5, torch.float32)
    grads = gradients(2, 40, 24, torch.float32)
    _, reference = power_sgd(grads, codec.Q)
    there_and_back(codec, grads[0])
    codec.end_step()
    error = there_and_back(codec, grads[1], 1).double() - reference
    assert error.norm() > 0.1 * reference.norm()


@every_dtype
@every_shape
def test_nothing_is_lost(dtype, shape):
    """What was decoded and the error that is left add up to the gradients, to fp32 rounding."""
    rows, width, columns = shape
    codec = build(width, columns, dtype)
    given, got = (torch.zeros(rows, width, dtype=torch.float64) for _ in range(2))
    for number, gradient in enumerate(gradients(8, rows, width, dtype)):
        given += gradient.double()
        got += there_and_back(codec, gradient, number).double()
        assert codec.error is not None and codec.error.dtype == torch.float32
        missing = given - got - codec.error.double()
        assert missing.abs().max() < 8 * 2**-23 * given.abs().max()
    if columns < min(rows, width):
        assert codec.error.norm() > 0.1 * given.norm()


@every_dtype
def test_the_error_is_what_the_receiver_misses(dtype):
    """Not what fp32 would miss: the roundings of both matrices and of the result are in it."""
    codec = build(24, 5, dtype)
    (gradient,) = gradients(1, 40, 24, dtype)
    out = there_and_back(codec, gradient)
    assert torch.equal(codec.error, gradient.float() - out.float())


@every_dtype
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_gradient_of_no_more_than_q_directions_is_exact(dtype, rank):
    codec = build(24, 5, torch.float32)
    for number, gradient in enumerate(gradients(4, 40, 24, torch.float32, rank)):
        out = there_and_back(codec, gradient, number)
        assert (out - gradient).norm() < 1e-5 * gradient.norm()
    codec = build(24, 5, dtype)
    (gradient,) = gradients(1, 40, 24, dtype, rank)
    error = there_and_back(codec, gradient).float() - gradient.float()
    assert error.norm() < ROUNDING[dtype] * gradient.float().norm()


def test_each_payload_starts_where_the_last_one_ended():
    """The power iteration converges to the largest directions of what comes again and again."""
    codec = build(24, 4, torch.float32)
    (gradient,) = gradients(1, 40, 24, torch.float32)
    left = []
    for _ in range(60):
        codec.end_step()  # without an error, so that it is one matrix
        left.append(float((there_and_back(codec, gradient) - gradient).norm()))
    best = float(torch.linalg.svdvals(gradient.double())[4:].norm())
    assert left[0] > 1.05 * best and left[-1] < 1.001 * best


@every_dtype
def test_zeros_and_dependent_columns(dtype):
    codec = build(24, 5, dtype)
    start = codec.Q.clone()
    zeros = torch.zeros(40, 24, dtype=dtype)
    assert not there_and_back(codec, zeros).any()
    assert torch.equal(codec.Q, start) and not codec.error.any()
    one = torch.zeros(40, 24, dtype=dtype)
    one[7, 3] = 2.0  # of rank 1
    for number in range(3):
        torch.testing.assert_close(there_and_back(codec, one, number), one, rtol=1e-2, atol=1e-2)
    (gradient,) = gradients(1, 40, 24, dtype)
    out = there_and_back(codec, gradient, 3).float()
    assert torch.linalg.matrix_rank(out, rtol=0.05) == 5  # no direction is lost for good
    assert codec.Q.isfinite().all() and codec.Q.norm(dim=0).min() > 0


@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_and_does_not_stay(dtype, value):
    codec, twin = build(24, 5, dtype), build(24, 5, dtype)
    grads = gradients(4, 40, 24, dtype)
    there_and_back(codec, grads[0])
    there_and_back(twin, grads[0])
    spoilt, blank = grads[1].clone(), grads[1].clone()
    spoilt[3, 5], blank[3] = value, 0
    twin.error[3] = 0
    out, expected = there_and_back(codec, spoilt, 1), there_and_back(twin, blank, 1)
    assert out[3].isnan().all()
    expected[3] = math.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert codec.error.isfinite().all() and not codec.error[3].any()
    assert torch.equal(codec.Q, twin.Q)
    for number in (2, 3):
        assert there_and_back(codec, grads[number], number).isfinite().all()


@every_dtype
def test_a_payload_that_is_not_finite_at_all(dtype):
    codec = build(24, 5, dtype)
    grads = gradients(2, 40, 24, dtype)
    there_and_back(codec, grads[0])
    start = codec.Q.clone()
    assert there_and_back(codec, torch.full_like(grads[0], math.inf), 1).isnan().all()
    assert torch.equal(codec.Q, start) and not codec.error.any()
    assert there_and_back(codec, grads[1], 2).isfinite().all()


def test_another_number_of_rows_starts_the_error_anew():
    codec, twin = build(24, 5, torch.float32), build(24, 5, torch.float32)
    few, many = gradients(1, 9, 24, torch.float32)[0], gradients(1, 40, 24, torch.float32)[0]
    for end in (codec, twin):
        there_and_back(end, few)
    twin.end_step()
    assert torch.equal(there_and_back(codec, many, 1), there_and_back(twin, many, 1))
    assert codec.error.shape == many.shape


def test_a_step_leaves_q_and_no_error():
    codec = build(24, 5, torch.bfloat16)
    (gradient,) = gradients(1, 40, 24, torch.bfloat16)
    there_and_back(codec, gradient)
    codec.end_step()
    assert codec.error is None
    saved = codec.state_dict()
    assert list(saved) == ["Q"]
    other = build(24, 5, torch.bfloat16, seed=8)
    other.load_state_dict(saved)
    assert torch.equal(other.encode(gradient, 1), codec.encode(gradient, 1))


def test_the_receiver_has_no_state():
    receiver = build(24, 5, torch.bfloat16, sends=False)
    assert not receiver.state_dict()
    with pytest.raises(RuntimeError, match="the receiving end of lowrank cannot encode"):
        receiver.encode(torch.zeros(40, 24, dtype=torch.bfloat16), 0)


def test_a_gradient_near_the_end_of_fp16_is_not_clipped():
    """Q itself would be up to √n times as large."""
    rows = torch.full((4000, 16), 60000.0, dtype=torch.float16)
    codec = build(16, 1, torch.float16)
    torch.testing.assert_close(there_and_back(codec, rows), rows, rtol=3e-3, atol=0)


def test_a_body_to_the_byte():
    """Written out by hand, for whoever writes another implementation: c is 2 for 3 rows."""
    codec = build(2, 1, torch.bfloat16)
    codec.Q.copy_(torch.tensor([[1.0], [0.0]]))
    rows = torch.tensor([[0.0, 0.0], [4.0, -8.0], [0.0, 0.0]], dtype=torch.bfloat16)
    assert codec.parts(3) == {"latents": (3 + 2) * 2}
    left, right = codec.encode(rows, 0).view(torch.bfloat16).split([3, 2])
    sign = float(left[1].sign())  # that of P is the factorisation's
    assert left.tolist() == [0, 2 * sign, 0] and right.tolist() == [2 * sign, -4 * sign]


def test_all_processes_start_alike_and_boundaries_do_not():
    assert torch.equal(build(24, 5, torch.float32).Q, build(24, 5, torch.float32).Q)
    assert not torch.equal(build(24, 5, torch.float32).Q, build(24, 5, torch.float32, seed=4).Q)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "--mapl-lowrank-q is missing: .*give --mapl-lowrank-q Q .*or name another codec"),
        (0, "--mapl-lowrank-q 0 must be at least 1"),
        (9, "--mapl-lowrank-q 9 exceeds the 8 numbers of a row; it is at most 8"),
    ],
)
def test_errors_name_flag_value_and_remedy(columns, message):
    with pytest.raises(ValueError, match=message):
        build(8, columns, torch.float32)


def test_fewer_rows_than_columns():
    codec = build(8, 5, torch.float32)
    message = "--mapl-lowrank-q 5 exceeds the 4 tokens of a micro-batch .*; it is at most 4"
    with pytest.raises(ValueError, match=message):
        codec.parts(4)
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(4, 8), 0)
    assert there_and_back(codec, torch.ones(5, 8)).isfinite().all()


def test_activations_are_refused():
    end = CodecEnd(
        role=Role.ACTIVATION,
        width=8,
        dtype=torch.float32,
        seed=0,
        settings=CodecSettings(lowrank_q=4),
    )
    message = "--mapl-forward-codec lowrank: it is for gradients.* give --mapl-backward-codec"
    with pytest.raises(ValueError, match=message):
        build_codec("lowrank", end)


def test_other_dtypes_are_refused():
    codec = build(8, 2, torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 was given to a codec for torch\.bfloat16"):
        codec.encode(torch.zeros(4, 8), 0)
