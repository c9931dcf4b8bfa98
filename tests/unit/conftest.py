# SPDX-License-Identifier: Apache-2.0
"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
