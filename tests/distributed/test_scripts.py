# SPDX-License-Identifier: Apache-2.0
"""Scripts that know nothing of boundaries, through `python -m megatron.mapl`."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from cluster import Cluster
from layouts import LAYOUTS, Layout

ROOT = Path(__file__).parent.parent.parent
LOSS = re.compile(r"lm loss(?: value)?: (\S+)")
SCRIPTS = Path(__file__).parent / "scripts"
CONFIGURED, PROVIDED = SCRIPTS / "configured.py", SCRIPTS / "provided.py"
BOUNDARIES = "--mapl-rank 16 --mapl-forward-codec int8 --mapl-backward-codec int4"

#: `make test-older` runs the tests of this file that this leaves.
MEGATRON = importlib.metadata.version("megatron-core")
OLDER = Version(MEGATRON) < Version("0.19")
before_019 = pytest.mark.skipif(not OLDER, reason="test_identity.py does it with our own script")
since_019 = pytest.mark.skipif(OLDER, reason="Megatron has no configuration of a GPT before 0.19")


@since_019
@pytest.mark.parametrize(
    ("script", "name"),
    [
        (CONFIGURED, "pp2"),
        (CONFIGURED, "pp4"),  # the stages in the middle read no data
        (PROVIDED, "pp2"),
        (PROVIDED, "pp2-vpp2-overlapped"),  # a function builds several chunks
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_it_trains_as_our_own_script_does(cluster: Cluster, script: Path, name: str) -> None:
    """Digit for digit, and byte for byte."""
    layout = LAYOUTS[name]
    command = layout.bare_command(BOUNDARIES)
    own = cluster.run_once(layout.world_size, command)
    assert own.records[0]["projectors"]
    other = cluster.run(layout.world_size, command, script=script)
    assert len(own.losses) >= 4
    assert other.losses == own.losses
    assert other.validation == own.validation
    assert other.traffic["total"] == own.traffic["total"]
    assert own.traffic["total"]["sent"] > 0


@since_019
@pytest.mark.parametrize(
    ("script", "habit"),
    [(CONFIGURED, []), (PROVIDED, []), (PROVIDED, ["--habit", "own-parser"])],
    ids=["configured", "provided", "own-parser"],
)
def test_without_the_flag_it_is_plain_megatron(
    cluster: Cluster, script: Path, habit: list[str]
) -> None:
    layout = LAYOUTS["pp2"]
    plain = cluster.run_once(layout.world_size, layout.command(), plain=True)
    other = cluster.run(layout.world_size, [*layout.command(), *habit], script=script)
    assert other.losses == plain.losses
    assert other.validation == plain.validation


@before_019
@pytest.mark.parametrize("name", ["pp2", "pp4", "tp2-sp-pp2", "pp2-vpp2-overlapped", "bf16"])
def test_a_square_projector_changes_nothing(cluster: Cluster, name: str) -> None:
    """Against the same script without boundaries."""
    layout = LAYOUTS[name]
    plain = cluster.run(layout.world_size, layout.command(), script=PROVIDED)
    square = layout.command("--mapl-rank 64 --mapl-anchor none")
    mapl = cluster.run(layout.world_size, square, script=PROVIDED)
    tolerance = {"bf16": 2e-3}.get(name, 1e-6)
    assert mapl.losses == pytest.approx(plain.losses, rel=tolerance)
    assert mapl.validation == pytest.approx(plain.validation, rel=tolerance)
    assert plain.losses[-1] < plain.losses[0] - 0.05
    assert f"Megatron {MEGATRON}" in mapl.log


def test_a_resumed_job_continues(cluster: Cluster, tmp_path: Path) -> None:
    """Bit for bit, with the distributed optimizer, whose state upstream loses without the mends."""
    layout = LAYOUTS["pp2-dp2-distributed-optimizer"]
    save = f"{BOUNDARIES} --save {tmp_path} --save-interval 2 --ckpt-format torch_dist"
    command = layout.bare_command(save)
    whole = cluster.run(layout.world_size, command, script=PROVIDED)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    rest = cluster.run(layout.world_size, [*command, "--load", str(tmp_path)], script=PROVIDED)
    assert rest.losses == whole.losses[2:]


#: habit of the script → what the one line must say.
REFUSED = {
    "another-model": "its model is a AnotherModel, but boundaries know .*GPTModel.*leave --mapl-",
    "more-tokens": "its model has the vocabulary size 384, but .* need 256; have the script build",
    "own-gradients": "its model has the finalize_model_grads_func .*, but .* need None; have",
    "own-loop": "it initializes Megatron, but not by .*pretrain .*call that one, .*, or leave --",
    "early-import": "it initializes Megatron, but not by .*import it no earlier than in the script",
    "own-parser": "pretrain without .*parse_and_validate_args, after which .*call that first",
    "no-training": "it has ended without a call of .*pretrain, so --mapl-rank had no effect; call",
    "exit-without-training": "it has ended without a call of .*pretrain, so --mapl-rank had no ef",
    "own-communicator": "it gives .*pretrain a p2p_communicator of its own, .*leave that or",
}


@pytest.mark.parametrize("habit", REFUSED)
def test_what_boundaries_do_not_go_with(cluster: Cluster, habit: str) -> None:
    if habit == "own-communicator" and OLDER:
        pytest.skip("Megatron's pretrain takes no communicator before 0.19")
    layout = LAYOUTS["pp2"]
    command = layout.bare_command(BOUNDARIES, "--habit", habit)
    result = cluster.run(layout.world_size, command, script=PROVIDED, fails=True)
    assert set(result.codes) == {2}, f"{result.codes}\n{result.log[-4000:]}"
    assert not re.search("iteration +1/", result.log)
    lines = [line for line in result.log.splitlines() if line.startswith("provided.py: error:")]
    assert len(lines) == 1, lines
    assert re.search(REFUSED[habit], lines[0]), lines[0]


def test_an_error_of_the_script_keeps_its_traceback(cluster: Cluster) -> None:
    command = LAYOUTS["pp2"].bare_command("--habit", "own-provider-fails")
    result = cluster.run(1, command, script=PROVIDED, fails=True)
    assert result.codes == [1]
    assert re.search("Traceback .*, in add_flag.*ValueError: a fault of", result.log, re.S)
    assert "provided.py: error" not in result.log


def test_settings_from_yaml(cluster: Cluster, tmp_path: Path) -> None:
    """Megatron then takes no flags at all, and would train without boundaries."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("train_iters: 4\n")
    command = ["--yaml-cfg", str(settings), "--mapl-rank", "8"]
    result = cluster.run(1, command, script=PROVIDED, fails=True)
    assert result.codes == [2], result.log[-3000:]
    assert re.search(
        "provided.py: error: --yaml-cfg takes the place of all other flags, so --mapl-rank",
        result.log,
    )


@since_019
@pytest.mark.parametrize("script", [CONFIGURED, PROVIDED], ids=lambda script: script.stem)
def test_help_lists_all_flags(cluster: Cluster, script: Path) -> None:
    """Also where a script has Megatron look for --inprocess-restart before it parses."""
    result = cluster.run(1, ["--mapl-rank", "16", "--help"], script=script)
    assert "error" not in result.log.splitlines()[-1]
    assert "--mapl-rank" in result.log and "--tensor-model-parallel-size" in result.log


def start(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Runs it in processes of its own, and returns what they print."""
    variables = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", **(environment or {})}
    variables["TMPDIR"] = str(cwd)  # torchrun leaves a folder of logs there
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@since_019
def test_python_starts_a_script_of_a_checkout(cluster: Cluster, tmp_path: Path) -> None:
    """Whose Megatron is used, wherever the job is started, and not that of site-packages."""
    checkout = tmp_path / "Megatron-LM"
    (checkout / "megatron").mkdir(parents=True)
    distribution = importlib.metadata.distribution("megatron-core")
    for package in ("core", "training"):
        source = Path(str(distribution.locate_file("megatron"))) / package
        (checkout / "megatron" / package).symlink_to(source)
    for script in (CONFIGURED, SCRIPTS / "script_parts.py"):
        shutil.copy(script, checkout)
    layout = Layout(1, "--mapl-virtual-stages 2")
    arguments = layout.bare_command(BOUNDARIES)
    own = cluster.run(1, arguments, tamper="whole_mock_data")
    command = ["-m", "megatron.mapl", "Megatron-LM/configured.py", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    printed = start(command, cwd=tmp_path, environment=alone)
    losses = LOSS.findall(printed)
    assert len(losses) >= 4 + 2  # of the steps, of validation and of test
    assert losses == LOSS.findall(own.log)
    assert f"Megatron of {checkout}/megatron/core/" in printed
    assert "the script goes on after training" in printed


@since_019
def test_torchrun_starts_the_same_job(cluster: Cluster, tmp_path: Path) -> None:
    """A script's checkpoint, which a process of its own helps to write, continues in ours."""
    layout = LAYOUTS["pp2"]
    save = f"--save {tmp_path}/saved --save-interval 2 --ckpt-format torch_dist --async-save"
    arguments = layout.bare_command(BOUNDARIES)
    own = cluster.run(2, arguments, tamper="whole_mock_data")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron.mapl", str(CONFIGURED), *arguments, *save.split()]
    losses = LOSS.findall(start(command, cwd=tmp_path))
    assert len(losses) >= 4 + 2
    assert losses == LOSS.findall(own.log)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    load = ["--load", f"{tmp_path}/saved", "--ckpt-format", "torch_dist"]
    rest = cluster.run(2, [*arguments, *load], tamper="whole_mock_data")
    assert rest.losses == own.losses[2:]


def test_our_own_script_is_one_too(cluster: Cluster) -> None:
    """On a version that it does not know, it is refused with what it misses."""
    layout = LAYOUTS["pp2"]
    command = layout.bare_command(BOUNDARIES)
    result = cluster.run(2, command, script=ROOT / "pretrain_gpt.py", fails=OLDER)
    if OLDER:
        line = (
            r"pretrain_gpt.py: error: Megatron 0.18.* does not have .*gpt_config_from_args, .*use"
        )
        assert result.codes == [2, 2] and re.search(line, result.log), result.log[-2000:]
    else:
        assert result.losses == cluster.run_once(2, command).losses
