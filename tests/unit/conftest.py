# SPDX-License-Identifier: Apache-2.0
"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
