# SPDX-License-Identifier: Apache-2.0
"""CPU mode: sets what Megatron needs without a GPU, and refuses what needs one.

`cpu.install` changes torch for the life of a process, so it runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.mapl import cpu

ROOT = Path(__file__).parent.parent.parent

WORKING = {"distributed_backend": "gloo", "transformer_impl": "local", "context_parallel_size": 1}

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_works_is_let_through() -> None:
    cpu.check_arguments(SimpleNamespace(**WORKING))


def test_defaults_are_what_the_check_requires() -> None:
    for dest, (_, works) in cpu._REQUIRED.items():
        assert cpu.ARGUMENT_DEFAULTS.get(dest, 1) == works


@pytest.mark.parametrize(
    ("dest", "value", "message"),
    [
        ("distributed_backend", "nccl", "--distributed-backend nccl .*--distributed-backend gloo"),
        (
            "transformer_impl",
            "transformer_engine",
            "--transformer-impl transformer_engine .*--transformer-impl local",
        ),
        ("context_parallel_size", 2, "--context-parallel-size 2 .*--context-parallel-size 1"),
    ],
)
def test_what_needs_a_gpu_is_refused(dest: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.check_arguments(SimpleNamespace(**{**WORKING, dest: value}))


def test_on_a_gpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> bool:
        return True

    monkeypatch.setattr(torch.cuda, "is_available", available)
    before = torch.cuda.synchronize, torch.nn.Module.cuda
    assert cpu.install() is False
    assert (torch.cuda.synchronize, torch.nn.Module.cuda) == before
    assert torch.cuda.is_available is available


STAND_INS = """
import os
import torch
from megatron.mapl import cpu

assert cpu.install() is True
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
assert not torch.accelerator.is_available()
for made in (
    torch.zeros(2, device="cuda"),
    torch.zeros(2, device=torch.device("cuda", 0)),
    torch.zeros(2, device=torch.cuda.current_device()),
    torch.zeros(2).cuda(),
    torch.zeros(2).to("cuda:0"),
    torch.nn.Linear(2, 2).cuda().weight,
):
    assert made.device.type == "cpu", made.device
torch.cuda.manual_seed(1)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
with torch.cuda.stream(torch.cuda.Stream()):
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    assert event.query() and event.elapsed_time(event) == 0
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
"""


@needs_no_gpu
def test_stand_ins() -> None:
    result = python(STAND_INS)
    assert result.returncode == 0, result.stderr


@needs_no_gpu
def test_a_moved_symbol_is_named() -> None:
    script = """
from megatron.mapl import cpu
cpu.install()
import megatron.training.training as training
del training.set_jit_fusion_options
cpu.patch_megatron()
"""
    result = python(script)
    assert result.returncode == 1
    assert "megatron.training.training.set_jit_fusion_options is not there" in result.stderr


PRODUCTS = """
import warnings
import torch
from megatron.mapl import cpu_matmul

warnings.simplefilter("error")
calls = []
kernel = torch.library.get_kernel

def recording(name, key):
    original = kernel(name, key)
    class Recorded:
        def call_boxed(self, keys, *args, **kwargs):
            calls.append((name, args[0].dtype))
            return original.call_boxed(keys, *args, **kwargs)
    return Recorded()

torch.library.get_kernel = recording

def results(dtype):
    def random(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
    a, b, c = random(5, 300), random(7, 300), random(5, 7)
    x, y, z = random(2, 5, 300), random(2, 300, 7), random(2, 5, 7)
    outs = [
        a @ b.t(), torch.addmm(c, a, b.t(), beta=0.5, alpha=2), torch.nn.functional.linear(x, b),
        torch.bmm(x, y), torch.baddbmm(z, x, y, beta=0.25, alpha=0.5),
        torch.baddbmm(torch.full_like(z, float("nan")), x, y, beta=0.0),
    ]
    sum(out.float().square().sum() for out in outs).backward()
    with torch.no_grad():
        for product, arguments, of in (
            (torch.mm, (a, b.t()), outs[0]), (torch.addmm, (c, a, b.t()), outs[1]),
            (torch.bmm, (x, y), outs[3]), (torch.baddbmm, (z, x, y), outs[4]),
        ):
            for out in (torch.full_like(of, float("nan")), of.new_empty(0)):
                assert product(*arguments, out=out) is out
                outs.append(out)
    return [*outs, *(leaf.grad for leaf in (a, b, c, x, y, z))]

def relative(got, reference):
    got, reference = got.detach().double(), reference.detach().double()
    return float((got - reference).norm() / reference.norm())

reference = results(torch.float64)
cpu_matmul.install(frozenset({torch.bfloat16, torch.float16}))
for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 1e-6)):
    calls.clear()
    got = results(dtype)
    assert {tensor.dtype for tensor in got} == {dtype}
    worst = max(map(relative, got, reference))
    assert worst < bound, (dtype, worst)
    names = {"aten::" + name for name in cpu_matmul._PRODUCTS}
    assert {name for name, _ in calls} == names | {name + ".out" for name in names}
    assert {seen for _, seen in calls} == {torch.float32}
try:
    torch.mm(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2))
except RuntimeError:
    print("as it should be")
"""


def test_products_in_16_bits_are_computed_in_32() -> None:
    """Forward and backward, on this processor whatever it can do."""
    run = python(PRODUCTS)
    assert run.stdout == "as it should be\n", run.stdout + run.stderr
