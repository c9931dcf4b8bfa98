# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled without the GPU that they are for, so that any machine can check that they do.

Each module of kernels lists in `SPECIALISATIONS` what its launches ask Triton for; the compiler
itself tells how many registers and how much shared memory each takes, and what it spills.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOPPER = 90


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument → Triton's type of it, such as "*bf16" or "i32".
        constants: the `tl.constexpr` arguments.
        options: num_warps, num_stages.
        divisible: arguments (pointers, sizes) that are multiples of 16, as nearly all are.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that went to (slow) local memory.
        shared: bytes of shared memory of a program.
    """

    name: str
    registers: int
    spilled: int
    shared: int


def compile_for(specialisation: Specialisation, capability: int = HOPPER) -> Resources:
    """Compiles a kernel for a GPU of that compute capability (10 × major + minor).

    Raises:
        RuntimeError: Triton runs its interpreter in this process, or the compiler's report has
            changed.
        triton.CompilationError: the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialisation.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("nothing can be compiled under TRITON_INTERPRET=1; unset it")
    names = kernel.arg_names
    constants = {(names.index(name),): v for name, v in specialisation.constants.items()}
    multiple = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr"
            if name in specialisation.constants
            else specialisation.signature[name]
            for name in names
        },
        constexprs=constants,
        attrs={(names.index(name),): multiple for name in specialisation.divisible},
    )
    options = dict(specialisation.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = _resource_usage(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump's report of {kernel.__name__} was not understood: {report}")
    registers, stack, local = map(int, found.groups())
    return Resources(kernel.__name__, registers, stack + local, compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
