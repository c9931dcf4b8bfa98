# SPDX-License-Identifier: Apache-2.0
"""Attention through torch's kernels: Megatron's numbers, outputs and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.mapl import cpu

cpu.install()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnBackend, AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron.mapl import attention  # noqa: E402
from megatron.mapl.attention import TorchAttention  # noqa: E402

TOKENS, BATCH, HEADS, WIDTH = 37, 3, 6, 8


class Group:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def build(cls: type, mask: AttnMaskType = AttnMaskType.causal, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HEADS * WIDTH,
        "num_attention_heads": HEADS,
        "attention_dropout": 0.0,
        **more,
    }
    return cls(
        config=TransformerConfig(**settings),
        layer_number=2,
        attn_mask_type=mask,
        attention_type="self",
        pg_collection=SimpleNamespace(tp=Group()),
    )


def inputs(groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    heads = (HEADS, groups, groups, HEADS)
    drawn = [torch.randn(TOKENS, BATCH, n, WIDTH, generator=generator).double() for n in heads]
    return [x.to(dtype).requires_grad_() for x in drawn]


def results(module: Any, tensors: list[torch.Tensor], mask: Any = None) -> list[torch.Tensor]:
    query, key, value, upstream = tensors
    out = module(query, key, value, mask)
    gradients = torch.autograd.grad(out, (query, key, value), upstream.detach().reshape(out.shape))
    return [out.detach(), *gradients]


@pytest.fixture(autouse=True)
def no_parallel_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron keeps the scores in a buffer of its parallel state, and generators beside it."""
    from megatron.core import parallel_state

    def tensor(shape: Any, dtype: torch.dtype, name: str) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    buffer = SimpleNamespace(get_tensor=tensor)
    monkeypatch.setattr(parallel_state, "get_global_memory_buffer", lambda: buffer)
    tracker = SimpleNamespace(fork=nullcontext)
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_numbers_are_megatrons(
    groups: int, mask: AttnMaskType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in fp32, against Megatron's own in fp64."""
    more = {"num_query_groups": groups}
    exact = results(build(DotProductAttention, mask, **more), inputs(groups, torch.float64))
    theirs = results(build(DotProductAttention, mask, **more), inputs(groups))
    monkeypatch.setattr(DotProductAttention, "forward", None)  # nothing falls back
    ours = results(build(TorchAttention, mask, **more), inputs(groups))
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        error = (one - reference).norm() / reference.norm()
        assert error < 1e-6
        assert error < 2 * (other - reference).norm() / reference.norm() + 1e-7


def test_scale_is_the_callers() -> None:
    tensors = inputs(HEADS)
    one, other = (build(cls) for cls in (TorchAttention, DotProductAttention))
    one.softmax_scale = other.softmax_scale = 0.5
    for a, b in zip(results(one, tensors), results(other, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "more",
    [{"window_size": (5, 0)}, {"softmax_type": "off-by-one"}, {"apply_query_key_layer_scaling": 1}],
    ids=str,
)
def test_what_torch_does_not_know_goes_megatrons_way(more: dict[str, Any]) -> None:
    tensors = inputs(HEADS)
    ours, theirs = (
        results(build(cls, **more), tensors) for cls in (TorchAttention, DotProductAttention)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_mask_is_heeded() -> None:
    mask = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = False
    tensors = inputs(2)
    ours, theirs = (
        results(build(cls, num_query_groups=2), tensors, mask)
        for cls in (TorchAttention, DotProductAttention)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_for_training(sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws from the generator of its tensor-parallel rank if heads are what is spread."""
    forked, drawn = [], []
    attend = TorchAttention._attend

    @contextmanager
    def fork() -> Iterator[None]:
        forked.append(True)
        yield
        forked.pop()

    def noting_attend(*args: Any) -> torch.Tensor:
        drawn.append(bool(forked))
        return attend(*args)

    tracker = SimpleNamespace(fork=fork)
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(TorchAttention, "_attend", noting_attend)
    tensors = inputs(HEADS)
    module = build(TorchAttention, attention_dropout=0.5, sequence_parallel=False)
    module.config.sequence_parallel = sequence_parallel  # which a group of one would refuse
    torch.manual_seed(0)
    first, second = results(module, tensors)[0], results(module, tensors)[0]
    assert not torch.equal(first, second)
    assert drawn == [not sequence_parallel] * 2
    module.eval()
    torch.testing.assert_close(
        results(module, tensors)[0], results(build(DotProductAttention), tensors)[0]
    )
    assert drawn[2:] == [False]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"transformer_impl": "transformer_engine"}, False),
        ({"attention_backend": AttnBackend.unfused}, False),
        ({"attention_backend": AttnBackend.local}, False),
        ({"reset_attention_mask": True}, False),
    ],
    ids=str,
)
def test_when_it_is_wanted(change: dict[str, Any], expected: bool) -> None:
    args = {
        "transformer_impl": "local",
        "attention_backend": AttnBackend.auto,
        "reset_attention_mask": False,
        **change,
    }
    assert attention.wanted(SimpleNamespace(**args)) is expected


def test_the_seam_is_there() -> None:
    assert LocalSpecProvider().core_attention() is DotProductAttention
