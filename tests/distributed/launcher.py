# SPDX-License-Identifier: Apache-2.0
"""Runs training jobs one after another: `launcher.py DIRECTORY`, with a job a line on stdin.

Importing torch and Megatron takes seconds, a tiny training job less. So this process imports once
and forks a child for every process of a job; the child is a fresh process with its own rendezvous,
as torchrun would have started it. The answer to a job is a line with the exit codes (see
cluster.py). It ends when stdin does.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy

POLL_SECONDS = 0.01
#: How long the peers of a failed process get to end by themselves.
GRACE_SECONDS = 10.0
#: Linux's prctl: the signal that a process gets when its parent has ended.
PR_SET_PDEATHSIG = 1


def main(directory: Path) -> None:
    """Serves jobs until stdin ends."""
    # Answers have a way of their own, since whatever is imported may print.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the clean-up of `serve`
    import recorder
    from megatron.mapl import cpu

    cpu.install()
    recorder.import_all()
    # The children copy pages that they write to, and a collection writes to all objects.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        folder = directory / job["folder"]
        folder.mkdir()
        print(json.dumps(serve(folder, job, answers)), file=answers)


def serve(folder: Path, job: dict[str, Any], answers: TextIO) -> list[int]:
    """Forks the children, waits for them, and ends them if one failed or time is up."""
    children: list[int] = []
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job["timeout"]
    try:
        for rank in range(job["world_size"]):
            child = os.fork()
            if child == 0:
                answers.close()  # whoever reads must see its end when this process has ended
                try:
                    os._exit(run(folder, job, rank))
                except BaseException:  # before the job had a log
                    traceback.print_exc()
                finally:
                    os._exit(1)
            children.append(child)
        while len(codes) < len(children):
            time.sleep(POLL_SECONDS)
            late = time.monotonic() > deadline
            for child in children:
                if child not in codes and (code := ended(child, kill=late)) is not None:
                    codes[child] = code
                    if code:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    finally:
        for child in children:
            if child not in codes:
                ended(child, kill=True)
    return [codes[child] for child in children]


def ended(child: int, *, kill: bool) -> int | None:
    """The exit code of a child that has ended, by itself or because it was to be killed."""
    if kill:
        os.kill(child, signal.SIGKILL)
    pid, status = os.waitpid(child, 0 if kill else os.WNOHANG)
    if not pid:
        return None
    # Workers that the job started (data loaders, checkpoint writers) end with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def run(folder: Path, job: dict[str, Any], rank: int) -> int:
    """In the child: one process of the job."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    # It must not outlive the launcher, however that ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    numpy.random.seed()  # its state is the launcher's, alike in all children
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["world_size"]),
        LOCAL_WORLD_SIZE=str(job["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
        **job["environment"],
    )
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["pretrain_gpt.py", *job["arguments"], *job["rank_arguments"].get(str(rank), [])]
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    import recorder

    try:
        if "--save" in job["arguments"]:
            # Megatron's writers of checkpoints report through a server process, which would have
            # to import torch and Megatron. Forked here it has them, and holds no connection yet.
            filesystem_async.get_write_results_queue("fork")
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
