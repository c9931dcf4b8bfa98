# SPDX-License-Identifier: Apache-2.0
"""A process that dies or hangs ends the others with a clear error, and nothing is lost."""

import re
from pathlib import Path

import pytest

from cluster import Cluster, Result
from layouts import LAYOUTS
from test_checkpoint import MAPL, SAVE


def assert_told(result: Result, victim: int) -> None:
    """The victim was killed, the others ended by themselves, and one line says why."""
    assert result.codes[victim] == -9
    others = [code for rank, code in enumerate(result.codes) if rank != victim]
    assert set(others) == {1}, f"{result.codes}\n{result.log[-4000:]}"
    lines = [x for x in result.log.splitlines() if x.startswith("pretrain_gpt.py: error:")]
    assert lines, result.log[-4000:]
    assert all("start the job again from its last checkpoint" in line for line in lines)
    assert any(re.search("is gone|does not answer", line) for line in lines)


def test_a_killed_process_ends_the_others(cluster: Cluster, tmp_path: Path) -> None:
    """Killed in step 3 of 4, in the middle of its micro-batches; resumed bitwise from step 2."""
    victim = 2
    layout = LAYOUTS["pp4"]
    straight = cluster.run(4, layout.command(MAPL, SAVE, f"--save {tmp_path}/straight"))
    killed = cluster.run(
        4,
        layout.command(MAPL, SAVE, f"--save {tmp_path}/cut"),
        tamper="die_in_step_3",
        environment={"VICTIM_RANK": str(victim)},
        fails=True,
    )
    assert_told(killed, victim)
    load = f"--save {tmp_path}/cut --load {tmp_path}/cut"
    resumed = cluster.run(4, layout.command(MAPL, SAVE, load))
    assert resumed.losses == straight.losses[2:]


@pytest.mark.parametrize(
    ("layout", "victim", "more"),
    [
        ("pp4", 0, ""),
        ("pp4", 3, "--mapl-receive-ahead 0"),
        ("pp4", 1, "--mapl-emulate-latency 5"),
        ("pp2-vpp2-overlapped", 1, ""),
        ("pp2-dp2", 1, ""),
    ],
)
def test_in_other_layouts(cluster: Cluster, layout: str, victim: int, more: str) -> None:
    result = cluster.run(
        LAYOUTS[layout].world_size,
        LAYOUTS[layout].command(MAPL, more),
        tamper="die_in_step_3",
        environment={"VICTIM_RANK": str(victim)},
        fails=True,
    )
    assert_told(result, victim)


@pytest.mark.parametrize("layout", ["pp4", "pp2-vpp2-overlapped"])
def test_through_staged_transfers(cluster: Cluster, layout: str) -> None:
    result = cluster.run(
        LAYOUTS[layout].world_size,
        LAYOUTS[layout].command(MAPL),
        tamper="staged_transfers_and_die_in_step_3",
        environment={"VICTIM_RANK": "1"},
        fails=True,
    )
    assert_told(result, 1)


def test_a_process_that_hangs(cluster: Cluster) -> None:
    """It is stopped, not ended, so that nobody hears of it: the time-out of the group ends it."""
    more = "--distributed-timeout-seconds-after-init 5"
    result = cluster.run(
        2,
        LAYOUTS["pp2"].command(MAPL, more),
        tamper="stop_in_step_3",
        environment={"VICTIM_RANK": "1"},
        fails=True,
    )
    assert result.codes[0] == 1
    (line,) = (x for x in result.log.splitlines() if x.startswith("pretrain_gpt.py: error:"))
    assert re.search("does not answer", line), line
