# SPDX-License-Identifier: Apache-2.0
"""Runs a training script with everything in place that it needs for boundaries."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.mapl import cpu, versions
from megatron.mapl.errors import exit_with_error

if TYPE_CHECKING:  # it imports Megatron, which is checked before
    from megatron.mapl.pretraining import Job

_running = False


def run(script: Callable[[], object]) -> None:
    """Runs the script, which must import Megatron no earlier.

    A script that runs inside a script gets what is already in place: so `pretrain_gpt.py` goes
    under `-m megatron.mapl` too.

    Args:
        script: reads its flags from `sys.argv`.
    """
    global _running
    if _running:
        script()
        return
    _running = True
    cpu_mode = cpu.install()
    try:
        versions.check()
    except versions.UnsupportedMegatronError as error:
        exit_with_error(error)
    from megatron.mapl.pretraining import Job

    job = Job(cpu_mode=cpu_mode)
    job.install()
    try:
        script()
    except SystemExit as stop:
        if stop.code not in (None, 0):  # it has failed, and says so itself
            raise
        _end(job)
        raise
    _end(job)


def _end(job: "Job") -> None:
    try:
        job.end()
    except ValueError as error:
        exit_with_error(error)
