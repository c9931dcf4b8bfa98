# SPDX-License-Identifier: Apache-2.0
"""Kernels launched again: only where Triton takes the same compiled kernel, and as it does."""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from mapl.ops import launch as launching  # noqa: E402
from mapl.ops.launch import launch  # noqa: E402


def plain(x, y, n, count, WIDTH, FLAG):
    """Never run."""


class Driver:
    """One that knows devices and streams, and nothing else."""

    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 + device


class Compiled:
    """What Triton gives for a launch; notes how it is launched again."""

    def __init__(self):
        self.again = []

    def __getitem__(self, grid):
        return lambda *args, stream: self.again.append((grid, args, stream))


class Kernel(triton.JITFunction):
    """A kernel that notes what goes to Triton."""

    def __init__(self):
        plain.__annotations__ = dict.fromkeys(("WIDTH", "FLAG"), triton.language.constexpr)
        super().__init__(plain, do_not_specialize=["count"])
        self.first = []

    def run(self, *args, grid, warmup, **constants):
        self.first.append((grid, args, constants, compiled := Compiled()))
        return compiled


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(launching.driver, "_active", driver)
    monkeypatch.setattr(launching, "_compiled", {})
    return driver


MEMORY = torch.zeros(64)
HALVES = torch.zeros(64, dtype=torch.bfloat16)
CONSTANTS = {"WIDTH": 8, "FLAG": True, "num_warps": 4}


def call(x=MEMORY, y=None, n=32, count=5, **changed):
    return (x, y, n, count), CONSTANTS | changed


def test_the_second_launch_goes_by_triton(driver):
    kernel = Kernel()
    for count in range(3):
        args, constants = call(count=count)
        launch(kernel, (3, 2), *args, **constants)
    ((grid, args, constants, compiled),) = kernel.first
    assert grid == (3, 2) and args[1:] == (None, 32, 0) and constants == CONSTANTS
    assert [(grid, args[1:], stream) for grid, args, stream in compiled.again] == [
        ((3, 2, 1), (None, 32, count, 8, True), 100) for count in (1, 2)
    ]


CALLS = {
    "as it was": call(),
    "another number that is not specialised": call(count=16),
    "one that takes eight bytes": call(count=2**31),
    "a negative one that does": call(count=-(2**31) - 1),
    "one without a sign": call(count=2**63),
    "dtype": call(HALVES),
    "alignment": call(MEMORY[1:]),
    "a tensor for none": call(y=MEMORY),
    "number not divisible": call(n=33),
    "number 1": call(n=1),
    "long number": call(n=2**40),
    "constant": call(WIDTH=16),
    "constant of another type": call(WIDTH=8.0),
    "integer for a truth value": call(FLAG=1),
    "warps": call(num_warps=8),
    "stages": call(num_stages=2),
}


def test_what_triton_compiles_apart_has_keys_apart(driver):
    kernel = Kernel()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def triton_key(args, constants):
        _, specialisation, options = bind(*args, **constants)
        return repr(specialisation) + repr(options)

    keys = {name: (launching._key(kernel, 0, *c), triton_key(*c)) for name, c in CALLS.items()}
    apart = 0
    for one, other in itertools.combinations(keys, 2):
        (own, due), (other_own, other_due) = keys[one], keys[other]
        assert own != other_own or due == other_due, (one, other)
        apart += due != other_due
    assert apart > 100
    assert keys["as it was"][0] == keys["another number that is not specialised"][0]


def test_devices_kernels_and_debugging_have_keys_apart(driver, monkeypatch):
    kernels = [Kernel(), Kernel()]
    args, constants = call()
    for kernel in kernels:
        launch(kernel, (1,), *args, **constants)
    driver.device = 1
    launch(kernels[0], (1,), *args, **constants)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    launch(kernels[0], (1,), *args, **constants)
    assert [len(kernel.first) for kernel in kernels] == [3, 1]


def test_with_a_hook_every_launch_goes_triton_s_own_way(driver):
    kernel = Kernel()
    kernel.add_pre_run_hook(print)
    args, constants = call()
    for _ in range(3):
        launch(kernel, (1,), *args, **constants)
    assert len(kernel.first) == 3


def test_no_more_than_so_many_are_kept(driver, monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 4)
    kernel = Kernel()
    for n in range(20):
        args, constants = call(n=n)
        launch(kernel, (1,), *args, **constants)
    assert len(kernel.first) == 20 and len(launching._compiled) <= 4


def test_triton_gives_the_compiled_kernel_back_and_takes_all_arguments():
    """In a process of its own: the interpreter replaces names of the language that is compiled."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launched_by_triton.py")
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = ast.literal_eval(run.stdout)
    assert told["launched"] == [
        ((2, 1, 1, 100), ("memory", value, value / 2, 16)) for value in (7, 7, 9)
    ]
    assert told["compiled"] == 2
