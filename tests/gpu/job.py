# SPDX-License-Identifier: Apache-2.0
"""One process of a training job of these tests, under torchrun: `job.py FOLDER JOB-AS-JSON`.

Notes what tests/distributed/recorder.py notes; see `jobs.py`.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.mapl import cpu

#: What `around_payloads` was called around in this process.
FRAMED: set[str] = set()


def main(folder: Path, job: dict[str, Any]) -> None:
    """Runs the job with its arguments."""
    cpu.install()  # before anything imports Megatron
    import torch

    import recorder

    recorder.import_all()
    if job["deterministic"]:
        make_deterministic()
    if job["around_payloads"] == "spoil":
        press_allocator()
    elif job["around_payloads"] == "wait":
        around_payloads(lambda: torch.cuda.current_stream().synchronize())
    sys.argv = ["pretrain_gpt.py", *job["arguments"]]
    rank = os.environ["RANK"]
    recorder.run(folder / f"record.{rank}", {"tamper": "", "plain": False})
    if job["around_payloads"]:
        # Both ends of a pipeline send; the first receives gradients, the last activations.
        assert "pack_body" in FRAMED and len(FRAMED) > 1, f"only {FRAMED} was framed"


def make_deterministic() -> None:
    """Same job, same bits: sums in one order, whatever the timing."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def around_payloads(action: Callable[[], object]) -> None:
    """Has `action` called before and after each payload is packed or unpacked."""
    from mapl.channel import Channel
    from megatron.mapl.model import StageBoundaries

    def frame(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            FRAMED.add(name)
            action()
            result = function(*args, **kwargs)
            action()
            return result

        setattr(owner, name, call)

    frame(Channel, "pack_body")
    frame(StageBoundaries, "receive")
    frame(StageBoundaries, "unpack_gradient")


def press_allocator() -> None:
    """Around every payload, memory that was freed just now is handed out again and spoilt.

    Whoever still reads or writes it from another stream gets, or makes, something else.
    """
    import torch

    def spoil() -> None:
        device = torch.cuda.current_device()
        sizes = [256 << shift for shift in range(13)]
        kept = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes * 2]
        del kept

    around_payloads(spoil)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
