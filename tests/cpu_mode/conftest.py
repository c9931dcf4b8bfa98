# SPDX-License-Identifier: Apache-2.0
"""Flags as a job of pretrain_gpt.py takes them, in the process of the tests."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from megatron.mapl import cpu

cpu.install()

from megatron.training import arguments as megatron_arguments  # noqa: E402
from megatron.training.global_vars import unset_global_variables  # noqa: E402

from megatron.mapl import pretraining  # noqa: E402
from tests.cpu_mode.flag_parsing import Parse  # noqa: E402


@pytest.fixture(scope="session")
def job() -> pretraining.Job:
    """With whose flags Megatron parses from here on."""
    installed = pretraining.Job(cpu_mode=True)
    installed.install()
    return installed


@pytest.fixture
def parse(job: pretraining.Job, monkeypatch: pytest.MonkeyPatch) -> Parse:
    def parsed(words: Sequence[str]) -> tuple[Any, Any]:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        unset_global_variables()
        args = megatron_arguments.parse_and_validate_args()
        return args, job.runtime

    return parsed
