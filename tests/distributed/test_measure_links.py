# SPDX-License-Identifier: Apache-2.0
"""measure_links.py under torchrun, over gloo, and between hosts with slow links."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import link_measurements
import plan_links
from shaped_hosts import NetworkError, ShapedHosts, check_machine

ROOT = Path(__file__).parent.parent.parent
TOOL = str(ROOT / "tools" / "measure_links.py")
VARIABLES = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_all_pairs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", TOOL, "--distributed-backend", "gloo"]
    command += ["--seconds", "0.02", "--output", "links.json"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**VARIABLES, "TMPDIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    measured = link_measurements.read(tmp_path / "links.json")
    assert measured.backend == "gloo"
    assert len(measured.hosts) == 3
    pairs = [(link.sender, link.receiver) for link in measured.links]
    assert pairs == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert all(link.mbit > 10 and link.latency_ms > 0 for link in measured.links)
    assert len(run.stdout.splitlines()) == 2 + 6 + 2
    links = plan_links.measured(tmp_path / "links.json", 3, 3)
    between = measured.between(2, 0)
    assert between is not None
    assert links[2].onward.bits_a_second == between.mbit_both_ways * 1e6


def test_links_that_are_slow(tmp_path: Path) -> None:
    """Two hosts, a link of 20 Mbit/s with headers: some 19 are left for payload."""
    try:
        check_machine()
    except NetworkError as error:
        pytest.skip(str(error))
    with ShapedHosts(2, 20) as hosts:
        processes = [
            subprocess.Popen(
                hosts.run_on(rank, [sys.executable, TOOL, "--distributed-backend", "gloo",
                                    "--seconds", "0.5"]),
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**VARIABLES, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                     "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29500",
                     "GLOO_SOCKET_IFNAME": hosts.device},
            )
            for rank in range(2)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    measured = link_measurements.read(tmp_path / "links.json")
    for link in measured.links:
        assert 17 < link.mbit < 20
        assert 16 < link.mbit_both_ways < 20
        assert link.latency_ms < 20


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ([], {}, "start it with torchrun"),
        ([], {"RANK": "0", "WORLD_SIZE": "1"}, "one process has no link"),
        (["--seconds", "0"], {"RANK": "0", "WORLD_SIZE": "2"}, "--seconds 0 must be positive"),
        (["--seconds", "inf"], {"RANK": "0", "WORLD_SIZE": "2"}, "--seconds inf must be positive"),
        (
            ["--output", "taken/links.json"],
            {"RANK": "0", "WORLD_SIZE": "2"},
            "--output taken/links.json: File exists; name a file that rank 0 can write",
        ),
        (["--output", "."], {"RANK": "0", "WORLD_SIZE": "2"}, "--output . is a folder"),
    ],
)
def test_calls_at_fault(
    flags: list[str], variables: dict[str, str], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import measure_links

    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()  # a file where a folder should be
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert measure_links.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("measure_links.py: error: ") and message in error
    assert error.count("\n") == 1


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    import measure_links

    with pytest.raises(SystemExit):
        measure_links.main(["--sec", "1"])
    assert "unrecognized arguments: --sec 1" in capsys.readouterr().err
