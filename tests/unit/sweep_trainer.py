# SPDX-License-Identifier: Apache-2.0
"""Stands in for pretrain_gpt.py where sweep.py is tested: prints, saves and stops as Megatron does.

Its "model" is the number of the step. --fake-crash N crashes after step N unless a file of that
name, which it makes, exists; --fake-seconds S is a step's time.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--train-iters", "--seed", "--save-interval", "--save-retain-interval"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--mapl-rank", type=int)
    for flag in ("--save", "--load", "--mapl-report-dir"):
        parser.add_argument(flag, type=Path)
    for flag in ("--global-batch-size", "--seq-length"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--exit-signal-handler", action="store_true", required=True)
    parser.add_argument("--fake-crash", type=int)
    parser.add_argument("--fake-seconds", type=float, default=0.0)
    parser.add_argument("--fake-broken", action="store_true")
    args = parser.parse_args()
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    if args.fake_broken:
        raise ValueError("a reason | to fail")
    step = first = 0
    if args.load:
        step = first = int((args.load / "latest_checkpointed_iteration.txt").read_text())
    say(f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}, from step {step}")
    say("[before the start of training step] datetime: 2026-01-01 00:00:00")
    kept = 0.0
    while step < args.train_iters:
        step += 1
        time.sleep(args.fake_seconds)
        loss = loss_after(step, args)
        # As Megatron does, which counts the first step again into the next line.
        mean = (kept + loss) / 2 if step == first + 2 else loss
        kept = loss
        say(f" iteration {step:8}/{args.train_iters:8} | elapsed time per iteration (ms): 20.0 | "
            f"lm loss: {mean:.6E} | skipped: 0")  # fmt: skip
        mark = args.save / f"crashed-{args.fake_crash}"
        if step == args.fake_crash and not mark.exists():
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
            raise RuntimeError(f"boom at {step}")
        if told or step % args.save_interval == 0:
            save(args, step, first, evaluations=0)
        if told:
            say("exiting program after receiving SIGTERM.")
            sys.exit(0)
    # A job that is resumed after its last step has only this left.
    loss = loss_after(step, args)
    say(f" validation loss at iteration {step} on validation set | lm loss value: {loss:.6E} | "
        "lm loss PPL: 1 |")  # fmt: skip
    save(args, step, first, evaluations=4)


def loss_after(step: int, args: argparse.Namespace) -> float:
    return float(10 / step + args.seed / 1e5 - (args.mapl_rank or 100) / 1e3)


def save(args: argparse.Namespace, step: int, first: int, evaluations: int) -> None:
    """The checkpoint and the report: 2 boundaries, a payload of 8 tokens, d = 64 in 2 bytes."""
    args.save.mkdir(parents=True, exist_ok=True)
    (args.save / "latest_checkpointed_iteration.txt").write_text(str(step))
    if args.mapl_rank is None:
        assert args.mapl_report_dir is None, "plain Megatron refuses it"
        return
    steps = step - first
    payloads = {"forward": steps + evaluations, "backward": steps}
    boundary = {
        direction: entry(count, latents=count * 8 * 2 * args.mapl_rank)
        for direction, count in payloads.items()
    }
    boundary["projector"] = entry(2 * steps, projector=steps * 80)
    plain = sum(payloads.values()) * 8 * 128
    report = {
        "boundaries": [{"boundary": n, **boundary, "uncompressed": plain} for n in range(2)],
        "steps": steps,
        "tokens": steps * args.global_batch_size * args.seq_length,
    }
    args.mapl_report_dir.mkdir(parents=True, exist_ok=True)
    (args.mapl_report_dir / "mapl_traffic.json").write_text(json.dumps(report))


def entry(payloads: int, latents: int = 0, projector: int = 0) -> dict[str, int]:
    zero = dict.fromkeys(("header", "ids", "indices", "scales", "codebook"), 0)
    return {**zero, "latents": latents, "projector": projector, "payloads": payloads}


def say(text: str) -> None:
    print(text, flush=True)


main()
