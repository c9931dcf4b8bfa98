# SPDX-License-Identifier: Apache-2.0
"""The lists of tools/sweeps: Megatron and MAPL take the flags of every run in them."""

from pathlib import Path

import pytest

import sweep_list
from tests.cpu_mode.flag_parsing import Parse

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "least", "rates"),
    [
        ("headline", 20, (0.02, 0.01)),
        ("search", 20, (0.02, 0.01)),
        ("short", 10, (0.02, 0.01)),
        ("adam", 3, (0.001, None)),
        ("geometry", 3, (0.02, 0.01)),
    ],
)
def test_flags_are_taken(
    name: str,
    least: int,
    rates: tuple[float, float | None],
    tmp_path: Path,
    parse: Parse,
) -> None:
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "data.model").touch()
    plan = sweep_list.read(ROOT / "tools" / "sweeps" / f"{name}.toml", tmp_path / "data")
    assert len(plan.runs) >= least
    for run in plan.runs:
        more = f"--save {tmp_path} --save-interval 1 --exit-signal-handler"
        more += " --tokenizer-type NullTokenizer --vocab-size 31999"  # for there is no dataset
        args, runtime = parse([*run.flags, *more.split()])
        assert (args.seed, args.train_iters) == (run.seed, run.steps)
        assert args.global_batch_size * args.seq_length == run.tokens_per_step == 65536
        assert (args.lr, args.decoupled_lr) == rates
        assert (runtime is None) == run.uncompressed
        if runtime is not None:
            assert runtime.config.virtual_stages == 4
            assert len(runtime.plan.ranks) == 3
