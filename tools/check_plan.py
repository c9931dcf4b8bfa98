# SPDX-License-Identifier: Apache-2.0
"""How far plan.py's predictions are from what the slow-network bench measured.

    sudo .venv/bin/python tools/bench_slow_network.py --no-emulation
    python tools/check_plan.py slow-network-out/slow_network.json

Each row of the bench is predicted from the bandwidth that a link carried (its "payload, both ways
at once"), and from one measured step: the uncompressed run's on an unlimited link says how fast
the processors are. All else is the model's shape and the setting's flags. Prints predicted and
measured seconds of each row and the median and the largest error.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plan_settings
import slow_network_plan as bench
from pipeline_step import Direction, Link
from plan_job import Job
from plan_prediction import Machine, predict, unlimited_seconds
from plan_settings import Setting
from slow_network_results import Results
from text_table import columns

#: What bench_slow_network.py makes its tokenizer for.
_VOCABULARY = 2048


@dataclass(frozen=True)
class Row:
    """One setting at one bandwidth (Mbit/s): seconds of a step."""

    setting: str
    mbit: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted / self.measured - 1


def job_of(sizes: bench.Sizes) -> Job:
    """What the bench trains."""
    return Job(
        num_layers=sizes.stages - 1,
        account_for_loss_in_pipeline_split=True,
        pipeline_model_parallel_size=sizes.stages,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.hidden,
        num_attention_heads=max(1, sizes.hidden // 128),
        seq_length=sizes.sequence,
        swiglu=True,
        vocab_size=_VOCABULARY,
        micro_batch_size=sizes.micro_batch,
        global_batch_size=sizes.micro_batch * sizes.micro_batches,
        distributed_backend="gloo",
    )


def check(results: Results) -> list[Row]:
    """Predicts what the bench measured over shaped links.

    Raises:
        ValueError: the uncompressed run was not measured on an unlimited link.
    """
    job = job_of(results.sizes)
    plain = Setting(bench.UNCOMPRESSED, {})
    measured = results.step(bench.UNCOMPRESSED, None)
    if measured is None:
        raise ValueError(f"it has no {bench.UNCOMPRESSED} run on an unlimited link, which says how "
                         "fast its processors are; measure that too")  # fmt: skip
    cores = float(results.machine["cores"])
    flops = unlimited_seconds(job, plain, cores) / measured
    flags = {setting.name: setting.flags for setting in bench.settings(results.sizes.hidden)}
    rows = []
    for timing in results.timings:
        if timing.mbit is None or timing.link != "shaped":
            continue
        way = Direction(results.goodput[timing.mbit] * 1e6, 0.0)
        machine = Machine(flops, (Link(way, way),) * (results.sizes.stages - 1), cores)
        setting = Setting(timing.setting, plan_settings.read(flags[timing.setting].split()))
        predicted = predict(job, setting, machine)
        rows.append(Row(timing.setting, timing.mbit, predicted.seconds, timing.step))
    return rows


def page(rows: Sequence[Row], *, markdown: bool) -> str:
    """A table, and the errors' median and largest."""
    cells = [
        [row.setting, f"{row.mbit:g}", f"{row.predicted:.2f}", f"{row.measured:.2f}",
         f"{row.error:+.1%}"]
        for row in rows
    ]  # fmt: skip
    names = ("setting", "Mbit/s", "predicted s", "measured s", "error")
    errors = [abs(row.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    return (
        f"{columns(names, cells, markdown=markdown)}\n\n"
        f"Error: median {statistics.median(errors):.1%}, largest {abs(worst.error):.1%} "
        f"({worst.setting} at {worst.mbit:g} Mbit/s), {len(rows)} rows."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison: exit code 2 for a file that cannot be compared with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="slow_network.json")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args(argv)
    try:
        rows = check(Results.from_json(options.results.read_text()))
        if not rows:
            raise ValueError("it has no step over a shaped link")
    except OSError as error:
        fault = f"{error.strerror}; make it with tools/bench_slow_network.py"
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        fault = f"is not what tools/bench_slow_network.py writes ({error!r}); make it anew"
    except ValueError as error:
        fault = str(error)
    else:
        print(page(rows, markdown=options.markdown))
        return 0
    print(f"check_plan.py: error: {options.results}: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
