# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels that were launched before, in half of Triton's own time on the host.

`kernel[grid](...)` binds and specialises each argument anew to find the compiled kernel that it
needs. Here the arguments' own properties are the key to it. Only the first launch with a key goes
that way; later ones call what it gave, as `compiled[grid](...)`.
"""

from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

#: Key → the kernel, whose id is in the key, compiled, and the constants that follow its arguments.
_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
#: A job has some dozens of keys. One whose sizes never repeat must not keep them all.
_MOST = 1024


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """The same as `kernel[grid](*args, **constants)`.

    Args:
        kernel: a `triton.jit` function.
        grid: programs in up to three dimensions.
        args: tensors, numbers and Nones: the first parameters of the kernel, in order.
        constants: the others, all of them `tl.constexpr`, and num_warps, num_stages.
    """
    assert all(type(arg) in (int, float) or arg is None or hasattr(arg, "data_ptr") for arg in args)
    if not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks:
        kernel[grid](*args, **constants)  # Triton's interpreter, or somebody who listens
        return
    device = driver.active.get_current_device()
    key = _key(kernel, device, args, constants)
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        if len(_compiled) >= _MOST:
            _compiled.clear()
        if compiled is None:  # a hook of Triton's cache took it over
            return
        names = kernel.arg_names[len(args) :]
        _compiled[key] = kernel, compiled, tuple(constants[name] for name in names)
        return
    _, compiled, rest = known
    stream = driver.active.get_current_stream(device)
    compiled[grid + (1,) * (3 - len(grid))](*args, *rest, stream=stream)


def _key(
    kernel: Any, device: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """Whatever Triton compiles a kernel anew for on NVIDIA's GPUs: what `JITFunction.run` sees."""
    key: list[Any] = [id(kernel), device, knobs.runtime.debug]
    key.append(knobs.compilation.instrumentation_mode)
    for arg, parameter in zip(args, kernel.params, strict=False):
        if type(arg) is int:
            # Of an argument that is not specialised, how many bytes hold it; else all there is.
            key.append(_size(arg) if parameter.do_not_specialize else arg)
        elif type(arg) is float:
            key.append("fp32")  # never specialised
        elif arg is None:
            key.append(None)
        else:
            key.append(arg.dtype)
            key.append(arg.data_ptr() % 16 == 0)
    key.extend(constants.items())
    key.extend(map(type, constants.values()))  # True is 1 in a key, and 1 is 1.0
    return tuple(key)


def _size(number: int) -> str:
    if -(2**31) <= number < 2**31:
        return "i32"
    return "i64" if -(2**63) <= number < 2**63 else "u64"
