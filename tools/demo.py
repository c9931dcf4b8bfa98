# SPDX-License-Identifier: Apache-2.0
"""Train a small LLaMA on this machine's CPU, without and with MAPL, and compare.

    python tools/demo.py [--mapl-flags "--mapl-rank 64" --mapl-flags "--mapl-rank 64 ..." ...]

1. Turns Python's standard library into a dataset (kept for the next time).
2. Trains a LLaMA over four pipeline stages, each a process of its own, plainly.
3. Trains it again with the same flags and those of MAPL, once for each `--mapl-flags`.
4. Prints and writes what both lost and learned: demo.md, demo.json, demo.png.
"""

import argparse
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mapl.files import write_atomically
from report_pictures import draw
from report_runs import Run, load_counted, smoothed, table
from training_data import DATA_FLAGS, fill_in
from training_log import TrainingLog, reason
from training_process import ROOT, environment, stop
from training_progress import Progress, clock

STAGES = 4
SEQUENCE = 256
SAMPLES = 16  # a step

MODEL = (
    f"--num-layers 4 --hidden-size 256 --ffn-hidden-size 688 --num-attention-heads 4 "
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --position-embedding-type rope "
    "--swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0"
)
TRAINING = (
    f"--pipeline-model-parallel-size {STAGES} --micro-batch-size 4 --global-batch-size {SAMPLES} "
    "--bf16 --use-distributed-optimizer --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "
    "--lr 1.5e-3 --min-lr 1.5e-4 --lr-decay-style cosine --lr-warmup-fraction 0.07 "
    "--log-interval 1 --eval-iters 8"
)
# 8×: 12 bits a latent for both legs, and scales, token ids, headers and the projector's exchange.
MAPL = "--mapl-rank 66"


class DemoError(RuntimeError):
    """A part of the demo failed; the message says which, and shows why."""


def demo(output: Path, steps: int, settings: Sequence[str]) -> None:
    """Prepare, train plainly and with each of the settings, compare.

    Raises:
        DemoError: a training or the preparation failed.
    """
    start = time.monotonic()
    data = prepare(output / "data" / "stdlib")
    flags = f"{MODEL} {TRAINING} --train-iters {steps} --eval-interval {steps // 4 + 1}".split()
    plain = train("uncompressed", [*flags, *data], steps, output / "uncompressed.log")
    runs = []
    for number, setting in enumerate(settings, start=1):
        report = output / ("mapl" if len(settings) == 1 else f"mapl-{number}")
        own = [*setting.split(), "--mapl-report-dir", str(report)]
        log = output / f"{report.name}.log"
        name = "MAPL" if setting == MAPL else "MAPL, " + setting.replace("--mapl-", "")
        mapl, counted = train(name, [*flags, *data, *own], steps, log), load_counted(report)
        runs.append(
            dataclasses.replace(
                mapl,
                traffic=counted.traffic,
                uncompressed=counted.uncompressed,
                communicating=counted.communicating,
            )
        )
    # Plain Megatron counts nothing; the other runs have counted what the same micro-batches take.
    bytes_of_plain = runs[0].uncompressed
    plain = dataclasses.replace(plain, traffic=bytes_of_plain, uncompressed=bytes_of_plain)
    publish(plain, runs, flags, settings, output)
    print(f"The demo took {clock(time.monotonic() - start)}.")


def prepare(prefix: Path) -> list[str]:
    """Make the dataset, or find it there; the flags that train on it."""
    print("Preparing the corpus: the source code of Python's standard library", flush=True)
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--source", "stdlib"]
    command += ["--output-prefix", str(prefix), "--vocab-size", "4096"]
    # Another Python's library is another corpus, and takes the old one's place.
    command += ["--valid-fraction", "0.02", "--overwrite"]
    if subprocess.run(command).returncode:
        raise DemoError(f"preparing the corpus failed, as said above: {shlex.join(command)}")
    return fill_in(DATA_FLAGS.split(), prefix)


def train(name: str, flags: Sequence[str], steps: int, log: Path) -> Run:
    """Train once, with a progress line; losses and seconds as the log has them.

    Raises:
        DemoError: the job failed, or ended before its last step.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(STAGES), str(ROOT / "pretrain_gpt.py"), *flags]
    print(f"\nTraining {name}: {steps} steps of {SAMPLES * SEQUENCE:,} tokens, "
          f"{STAGES} processes (log: {log})", flush=True)  # fmt: skip
    seen = TrainingLog()
    with Progress(name, steps, SAMPLES * SEQUENCE) as progress:

        def follow(line: str) -> None:
            if step := seen.read(line):
                progress.step(step)

        run_job(command, log, follow)
    if len(seen.steps) != steps or seen.finished != steps:
        raise DemoError(f"the log shows {len(seen.steps)} of {steps} steps, or no last validation "
                        f"loss; see {log}")  # fmt: skip
    return Run(name, seen.losses, seen.validations, seconds=seen.seconds)


def run_job(command: Sequence[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run torchrun, hand on and log what it prints; whatever happens, none of it is left running.

    Raises:
        DemoError: it failed; the message has the end of its log.
    """
    # There may be GPUs, but hardly one for each stage.
    variables = {**environment(STAGES), "CUDA_VISIBLE_DEVICES": ""}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        # A group of its own: Ctrl-C reaches this process alone, which then ends the job in order.
        process = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                on_line(line)
            code = process.wait()
        finally:
            stop(process)
    if code:
        raise DemoError(f"the training ended with exit code {code}; from {log}:\n{reason(log)}")


def publish(
    plain: Run,
    compressed: Sequence[Run],
    flags: Sequence[str],
    settings: Sequence[str],
    output: Path,
) -> None:
    """Print the comparison, and write it as text, as data and as a picture."""
    runs = [plain, *compressed]
    base = plain.validation[-1][1]
    lines = [
        f"{run.name}: training loss from {run.losses[0][1]:.3f} to "
        f"{smoothed([loss for _, loss in run.losses])[-1]:.3f} (mean of the last 5 steps), "
        f"validation loss {run.validation[-1][1]:.4f}."
        for run in runs
    ]
    for run in compressed:
        change = run.validation[-1][1] / base - 1
        lines.append(
            f"{run.name}: with {run.ratio:.2f}× less traffic, all bytes counted, the validation "
            f"loss is {abs(change):.2%} {'above' if change > 0 else 'below'} the uncompressed "
            "run's."
        )
    lines.append(
        "All ran over this machine's loopback, where bytes cost nothing: the seconds show what "
        "MAPL computes, not what it saves on a slow network."
    )
    summary = "\n".join(lines)
    print(f"\n{table(runs)}\n\n{summary}")
    draw(runs, output / "demo.png")
    page = f"# Demo\n\n{table(runs, markdown=True)}\n\n{summary}\n\n![](demo.png)\n"
    write_atomically(output / "demo.md", page.encode())
    figures = {"flags": list(flags), "mapl_flags": list(settings)}
    data = {**figures, "runs": [{**dataclasses.asdict(run), "ratio": run.ratio} for run in runs]}
    write_atomically(output / "demo.json", (json.dumps(data, indent=2) + "\n").encode())
    print(f"Written: {output / 'demo.png'}, demo.md and demo.json beside it.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; a failure is told on stderr, with exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo-out"), help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=150, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--mapl-flags", action="append", metavar="FLAGS",
        help=f"of a compressed run, in quotes; may be given several times (default: '{MAPL}')",
    )  # fmt: skip
    options = parser.parse_args(argv)
    settings = options.mapl_flags or [MAPL]
    for setting in settings:
        if "--mapl-rank" not in setting.split():
            parser.error(f"--mapl-flags '{setting}' has no --mapl-rank, and so no boundaries")
    if options.steps < 4:
        parser.error(f"--steps {options.steps} is too few; give 4 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an end in order, as for Ctrl-C
    try:
        demo(options.output_dir, options.steps, settings)
    except (DemoError, ValueError, OSError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo.py: interrupted; the training processes were ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
