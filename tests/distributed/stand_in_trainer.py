# SPDX-License-Identifier: Apache-2.0
"""Stands in for Python in train.sh: what torchrun is called with, and a job that does as told.

`tools/data_flags.py` runs as it is. For torchrun it notes its words and variables in
$STAND_IN/node-RANK.json, and starts one process in a session of its own, as torchrun does, which
follows $STAND_IN_JOB:

    nothing      ends
    finish       saves the last step and ends
    crash-N      saves step N, unless that is 0, and fails
    until-told   waits for SIGTERM, then saves step 7 and ends; leaves PID.ready when it waits
    starts       the same, but for a second it does not know SIGTERM yet
    slow-data    the same as until-told, but `tools/data_flags.py` takes a second
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NOTED = ("MASTER", "NCCL", "GLOO", "CUDA", "SRUN")


def value(words: list[str], flag: str) -> str:
    """The last value of a flag."""
    return words[len(words) - words[::-1].index(flag)]


def save(words: list[str], step: int) -> None:
    """Leaves what Megatron leaves last."""
    folder = Path(value(words, "--save"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def work(words: list[str]) -> int:
    """The process of a job."""
    job = os.environ["STAND_IN_JOB"]
    if job.startswith("crash-"):
        if step := int(job.removeprefix("crash-")):
            save(words, step)
        return 3
    if job == "nothing":
        return 0
    if job == "finish":
        save(words, int(value(words, "--train-iters")))
        return 0
    if job == "starts":
        Path(os.environ["STAND_IN"], "starting").touch()
        time.sleep(1)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    draft = Path(os.environ["STAND_IN"], f"{os.getpid()}.tmp")
    draft.write_text(str(os.getpid()))
    draft.rename(draft.with_suffix(".ready"))
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # saving takes a while, in which torchrun must be there
    save(words, 7)
    return 0 if told else 4


def main(words: list[str]) -> int:
    """What `python WORDS` would be."""
    if words[0].endswith("data_flags.py"):
        if os.environ["STAND_IN_JOB"] == "slow-data":
            Path(os.environ["STAND_IN"], "preparing").touch()
            time.sleep(1)
        os.execv(sys.executable, [sys.executable, *words])
    if words[0] == "work":
        return work(words[1:])
    rank = value(words, "--node-rank") if "--node-rank" in words else "0"
    variables = {k: v for k, v in os.environ.items() if k.startswith(NOTED)}
    ignored = [s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN]
    note = {"words": words, "variables": variables, "ignores": ignored}
    Path(os.environ["STAND_IN"], f"node-{rank}.json").write_text(json.dumps(note))
    job = [sys.executable, __file__, "work", *words]
    return subprocess.Popen(job, start_new_session=True).wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
