# SPDX-License-Identifier: Apache-2.0
"""The choice between reference and kernels, and what a wrong one is told."""

import pytest
import torch

from mapl.ops import use_triton

ON_CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("MAPL_OPS", raising=False)


def test_without_a_gpu_the_reference():
    assert not use_triton(ON_CPU)


def test_kernels_can_be_forced(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(ON_CPU)


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"MAPL_OPS=triton with a tensor on cpu.*=reference"):
        use_triton(ON_CPU)


def test_no_other_value(monkeypatch):
    monkeypatch.setenv("MAPL_OPS", "cuda")
    with pytest.raises(ValueError, match="MAPL_OPS=cuda is not a choice; use reference or triton"):
        use_triton(ON_CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_kernels_unless_the_reference_is_forced(monkeypatch):
    on_gpu = ON_CPU.cuda()
    assert use_triton(on_gpu)
    monkeypatch.setenv("MAPL_OPS", "reference")
    assert not use_triton(on_gpu)
