# SPDX-License-Identifier: Apache-2.0
"""Runs training jobs one after another under one torchrun: `torchrun launcher.py DIRECTORY`.

Importing torch and Megatron takes each process seconds, a tiny training job less. So each process
imports once and then forks a child for every job; the child is a fresh process of its own job, with
its own rendezvous, as torchrun would have started it. Jobs arrive as files (see cluster.py).
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01
#: How long the peers of a failed process get to end by themselves.
GRACE_SECONDS = 10.0


def main(directory: Path) -> None:
    """Serves jobs until the file `stop` appears."""
    rank = int(os.environ["RANK"])
    import recorder
    from megatron.mapl import cpu

    cpu.install()
    recorder.import_all()
    # The children copy pages that they write to, and a collection writes to all objects.
    gc.collect()
    gc.freeze()
    (directory / f"ready.{rank}").touch()
    number = 0
    while not (directory / "stop").exists():
        job_file = directory / f"job-{number}.json"
        if not job_file.exists():
            time.sleep(POLL_SECONDS)
            continue
        job = json.loads(job_file.read_text())
        if rank < job["world_size"]:
            serve(directory / f"job-{number}", job, rank)
        number += 1


def serve(folder: Path, job: dict[str, Any], rank: int) -> None:
    """Forks the child, waits for it, and ends it if a peer failed or time is up."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(run(folder, job, rank))
    deadline = time.monotonic() + job["timeout"]
    code = None
    while code is None:
        time.sleep(POLL_SECONDS)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
        elif any(f.read_text() not in ("", "0") for f in folder.glob("status.*")):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if code is None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -int(signal.SIGKILL)
    # Workers that the job started (data loaders, checkpoint writers) end with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    (folder / f"status.{rank}").write_text(str(code))


def run(folder: Path, job: dict[str, Any], rank: int) -> int:
    """In the child: one process of the job."""
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "GROUP_"))]:
        del os.environ[name]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
        **job["environment"],
    )
    os.chdir(folder)
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["pretrain_gpt.py", *job["arguments"], *job["rank_arguments"].get(str(rank), [])]
    import recorder

    try:
        recorder.run(folder / f"record.{rank}", job)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main(Path(sys.argv[1]))
