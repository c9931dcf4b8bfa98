# SPDX-License-Identifier: Apache-2.0
"""examples/llama/slurm: the batch scripts with a SLURM and a trainer that are stand-ins."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llama_example import LLAMA, SlurmJob, environment, noted, stand_in, wait_until
from stand_in_trainer import value

SCRIPTS = ["bare-metal.sbatch", "container.sbatch"]
RECIPE = ["tiny", "--mock-data"]


def job(
    folder: Path, does: str = "finish", script: str = SCRIPTS[0], *words: str, **variables: str
) -> SlurmJob:
    given = {**stand_in(folder, does), "SAVE": str(folder / "saved"), **variables}
    if script == "container.sbatch":
        given.setdefault("CONTAINER_IMAGE", "image.sif")
    return SlurmJob(folder, script, [*RECIPE, *words], given)


def step(folder: Path, number: int) -> None:
    (folder / "saved").mkdir()
    (folder / "saved" / "latest_checkpointed_iteration.txt").write_text(f"{number}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_node_trains(tmp_path: Path, script: str) -> None:
    running = job(tmp_path, "finish", script, "--lr", "0.1", SLURM_CPUS_PER_TASK="12")
    assert running.run() == 0, running.log.read_text()
    assert not running.requeued
    for node in (0, 1):
        note = noted(tmp_path, node)
        assert value(note["words"], "--nnodes") == "2"
        assert value(note["words"], "--nproc-per-node") == "1"
        assert value(note["words"], "--master-addr") == "localhost"
        assert value(note["words"], "--master-port") == "24711"
        assert value(note["words"], "--lr") == "0.1"
        assert note["variables"]["SRUN_CPUS_PER_TASK"] == "12"
    assert running.srun[0][:4] == [
        "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
    ]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_whose_time_is_nearly_up_saves_and_is_queued_again(
    tmp_path: Path, script: str
) -> None:
    running = job(tmp_path, "until-told", script)
    process = running.start()
    wait_until(lambda: len([*tmp_path.glob("*.ready")]) == 2, process)
    running.time_is_nearly_up()
    assert process.wait(timeout=300) == 0, running.log.read_text()
    assert running.requeued == 1
    assert "start 0: tiny on 2 nodes from step 0 of 200" in running.log.read_text()
    assert "ended with status 0 at step 7 of 200" in running.log.read_text()


@pytest.mark.parametrize(
    ("before", "does", "code", "requeued"),
    [
        (100, "finish", 0, 0),  # done
        (200, "finish", 0, 0),  # was done already
        (100, "crash-150", 0, 1),  # has come further
        (100, "crash-0", 137, 0),  # has not: it would come back for ever
        (0, "crash-0", 137, 0),
        (100, "crash-200", 137, 0),  # trained, but its last evaluation failed
    ],
)
def test_who_is_queued_again(
    tmp_path: Path, before: int, does: str, code: int, requeued: int
) -> None:
    if before:
        step(tmp_path, before)
    running = job(tmp_path, does)
    # The other node's process is killed, unless it has failed by itself before.
    assert running.run() in (code, code and 3), running.log.read_text()
    assert running.requeued == requeued


def test_the_last_step_and_the_folder_are_those_of_the_flags(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    words = ["--train-iters=150", "--save", str(elsewhere)]
    running = job(tmp_path, "crash-150", SCRIPTS[0], *words)
    assert running.run() in (3, 137)  # after the last step
    assert not running.requeued and elsewhere.exists()


def test_weights_to_start_from_are_step_0(tmp_path: Path) -> None:
    step(tmp_path, 0)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("release")
    running = job(tmp_path, "crash-1")
    assert running.run() == 0 and running.requeued == 1
    assert "from step 0 of 200" in running.log.read_text()


def test_the_master_listens_on_the_network_that_is_asked_for(tmp_path: Path) -> None:
    running = job(tmp_path, NETWORK_INTERFACE="lo")
    assert running.run() == 0, running.log.read_text()
    note = noted(tmp_path, 1)
    assert value(note["words"], "--master-addr") == "127.0.0.1"
    assert note["variables"]["GLOO_SOCKET_IFNAME"] == "lo"


def test_pyxis_and_apptainer_see_the_checkout_and_the_mounts(tmp_path: Path) -> None:
    root = LLAMA.parent.parent
    extra, saved, data = tmp_path / "extra", tmp_path / "saved", tmp_path / "data"
    extra.mkdir()
    mounts = ",".join(f"{path}:{path}" for path in (root, saved, data, extra))
    more = {"CONTAINER_IMAGE": "registry#mapl:1", "CONTAINER_MOUNTS": f"{extra},{extra}"}
    more["DATA"] = str(data / "corpus")  # not read: --mock-data
    pyxis = job(tmp_path, "finish", "container.sbatch", **more)
    assert pyxis.run() == 0, pyxis.log.read_text()
    assert pyxis.srun[0][4:] == [
        "--container-image=registry#mapl:1", f"--container-mounts={mounts}",
        f"--container-workdir={root}", "bash", "examples/llama/train.sh", *RECIPE,
    ]  # fmt: skip
    more["CONTAINER_IMAGE"] = "image.sif"
    apptainer = job(tmp_path, "finish", "container.sbatch", **more)
    assert apptainer.run() == 0, apptainer.log.read_text()
    assert (tmp_path / "apptainer").read_text().splitlines()[0] == (
        f"exec --nv --bind {mounts} --pwd {root} image.sif bash examples/llama/train.sh tiny "
        "--mock-data"
    )


def test_a_container_sees_where_links_of_the_checkout_lead(tmp_path: Path) -> None:
    """A checkout whose checkpoints are elsewhere, as on clusters with a small home."""
    checkout, scratch = tmp_path / "checkout", tmp_path / "scratch"
    scratch.mkdir()
    shutil.copytree(LLAMA, checkout / "examples" / "llama")
    (checkout / "checkpoints").symlink_to(scratch)
    script = (
        "source examples/llama/slurm/job.sh; choose_mounts tiny --mock-data; echo $mounts;"
        "choose_mounts tiny --save here; echo $mounts"
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=checkout, env=environment(), check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    code = f"{checkout}:{checkout}"
    assert done.stdout.splitlines() == [f"{code},{scratch}/tiny:{scratch}/tiny", code]
    assert (scratch / "tiny").is_dir() and (checkout / "here").is_dir()


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("bare-metal.sbatch", [], {}, "name a recipe"),
        ("bare-metal.sbatch", ["2b"], {}, "there is no recipe '2b'"),
        ("bare-metal.sbatch", RECIPE, {"NETWORK_INTERFACE": "wan9"}, "has no IPv4 address"),
        ("container.sbatch", RECIPE, {}, "CONTAINER_IMAGE is not set"),
        ("container.sbatch", [], {"CONTAINER_IMAGE": "image.sif"}, "name a recipe"),
        (
            "container.sbatch",
            RECIPE,
            {"CONTAINER_IMAGE": "image.sif", "CONTAINER_MOUNTS": "/tmp:/data"},
            "CONTAINER_MOUNTS=/tmp:/data mounts at another path, .*; give PATH",
        ),
        (
            "container.sbatch",
            RECIPE,
            {"CONTAINER_IMAGE": "image.sif", "CONTAINER_MOUNTS": "/nowhere"},
            "CONTAINER_MOUNTS=/nowhere: '/nowhere' is not the absolute path",
        ),
    ],
)
def test_errors_come_before_srun(
    tmp_path: Path, script: str, words: list[str], variables: dict[str, str], message: str
) -> None:
    given = {**stand_in(tmp_path), "SAVE": str(tmp_path / "saved"), **variables}
    running = SlurmJob(tmp_path, script, words, given)
    assert running.run() == 2
    assert re.search(message, running.log.read_text())
    assert not (tmp_path / "srun.jsonl").exists() and not (tmp_path / "saved").exists()


def test_no_script_runs_without_slurm(tmp_path: Path) -> None:
    running = job(tmp_path)
    del running.variables["SLURM_SUBMIT_DIR"]
    assert running.run() != 0
    assert "without SLURM use examples/llama/train.sh" in running.log.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_ask_slurm_for_what_resuming_needs(script: str) -> None:
    text = (LLAMA / "slurm" / script).read_text()
    for option in ("--requeue", "--open-mode=append", "--signal=USR1@600", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}\n" in text
    for site in ("--partition", "--account", "--qos", "--mail"):
        assert f"#SBATCH {site}" not in text
