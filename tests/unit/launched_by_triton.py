# SPDX-License-Identifier: Apache-2.0
"""Launches a kernel three times, with Triton's own code around a driver that launches nothing.

Prints what `mapl.ops.launch` relies on: how the compiled kernel was launched, and how many kept.
"""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from mapl.ops import launch as launching

LAUNCHED = []


class Utils:
    def load_binary(self, *args):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**20}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args):
        LAUNCHED.append((args[:4], args[9:]))


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 100 + device


def store(x, value, factor, WIDTH: tl.constexpr):
    place = tl.arange(0, WIDTH)
    tl.store(x + place, value * factor)


def main() -> None:
    launching.driver._active = Driver()
    kernel = triton.JITFunction(store)
    memory = torch.zeros(64)
    for value in (7, 7, 9):
        launching.launch(kernel, (2,), memory, value, value / 2, WIDTH=16)
    launched = [
        (where, tuple("memory" if arg is memory else arg for arg in args))
        for where, args in LAUNCHED
    ]
    print({"launched": launched, "compiled": len(launching._compiled)})


if __name__ == "__main__":
    main()
