# SPDX-License-Identifier: Apache-2.0
"""`pretrain_gpt.py` on one GPU, with or without Transformer Engine: it trains and resumes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from layouts import MODEL  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: What Transformer Engine and Apex would bring is left out by itself where they are missing.
PRECISION = "--bf16 --use-distributed-optimizer".split()


def train(folder: Path, *more: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["1", str(ROOT / "pretrain_gpt.py"), *MODEL, *PRECISION, *more]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    return run.stdout


def losses(output: str) -> list[str]:
    """The loss of the first step, and those of the evaluations at the end.

    Megatron prints from the second step on a mean over steps since the start.
    """
    first = re.findall(r"iteration +\d+/.*? lm loss: (\S+)", output)[:1]
    return first + re.findall(r"validation loss at .*? lm loss value: (\S+)", output)


def test_training_resumes_to_the_same_losses(tmp_path: Path) -> None:
    schedule = "--lr-decay-iters 10 --save-interval 2 --ckpt-format torch_dist".split()
    whole = losses(train(tmp_path, *schedule))
    assert len(whole) == 3 and float(whole[-1]) < float(whole[0]) - 0.05
    train(tmp_path, *schedule, "--save", "ckpt", "--exit-interval", "2")
    resumed = losses(train(tmp_path, *schedule, "--save", "ckpt", "--load", "ckpt"))
    assert resumed[1:] == whole[1:]


def test_boundaries_need_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a pipeline of one stage has no boundary"):
        train(tmp_path, "--mapl-rank", "16")
