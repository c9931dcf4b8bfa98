# SPDX-License-Identifier: Apache-2.0
"""One process of a training of the pipeline bench, under torchrun; notes what it measures.

`pretrain_gpt.py` with a clock: at the end of each step, once the device is done, the time is noted,
and the memory at the end. Writes rank-N.json to the working directory.

With PROFILE_RANK and PROFILE_STEP in the environment, that step of that process is profiled
(bench_pipeline_profile.py).
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron.mapl import cpu


def train(start: float) -> None:
    """Runs pretrain_gpt.py's script, which must import Megatron's `pretrain` no earlier."""
    from megatron.mapl import gpt

    gpt.train(program_start=start)


def main() -> None:
    """Trains with the arguments in sys.argv."""
    start = time.time()
    cpu_mode = cpu.install()  # before anything imports Megatron
    import torch
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training import training

    from megatron.mapl import session

    # It would shuffle millions of mock samples for the few that a job takes.
    MockGPTLowLevelDataset.size = 5000
    record: dict[str, Any] = {"times": [], "losses": [], "imported": time.time() - start}
    log, train_step = training.training_log, training.train_step
    mine = os.environ.get("PROFILE_RANK") == os.environ["RANK"]
    profiled = int(os.environ["PROFILE_STEP"]) if mine else -1

    def noting_log(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        record["times"].append(time.perf_counter())
        record["losses"] += [float(value) for key, value in loss_dict.items() if key == "lm loss"]
        return log(loss_dict, *args, **kwargs)

    def profiling_step(*args: Any, **kwargs: Any) -> Any:
        if len(record["times"]) != profiled:
            return train_step(*args, **kwargs)
        from bench_pipeline_profile import profile

        result, record["profile"] = profile(
            lambda: train_step(*args, **kwargs), Path("trace.json"), cpu_mode=cpu_mode
        )
        return result

    training.training_log, training.train_step = noting_log, profiling_step
    try:
        session.run(lambda: train(start))
    finally:
        record["max_memory"] = torch.cuda.max_memory_allocated()
        record["max_reserved"] = torch.cuda.max_memory_reserved()
        record["device"] = "cpu" if cpu_mode else torch.cuda.get_device_name()
        Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
