# SPDX-License-Identifier: Apache-2.0
"""The lists of tools/sweeps: Megatron and MAPL take the flags of every run in them."""

from pathlib import Path

import pytest

import sweep_list
from tests.cpu_mode.flag_parsing import Parse

LISTS = Path(__file__).parent.parent.parent / "tools" / "sweeps"

#: --lr and --decoupled-lr of each list.
RATES: dict[str, tuple[float, float | None]] = {
    "headline": (0.02, 0.01),
    "anchors": (0.02, 0.01),
    "search": (0.02, 0.01),
    "short": (0.02, 0.01),
    "adam": (0.001, None),
    "geometry": (0.02, 0.01),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in LISTS.glob("*.toml")))
def test_flags_are_taken(name: str, tmp_path: Path, parse: Parse) -> None:
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "data.model").touch()
    path = LISTS / f"{name}.toml"
    plan = sweep_list.read(path, tmp_path / "data")
    assert len(plan.runs) >= path.read_text().count("[[run]]") > 0
    for run in plan.runs:
        more = f"--save {tmp_path} --save-interval 1 --exit-signal-handler"
        more += " --tokenizer-type NullTokenizer --vocab-size 31999"  # for there is no dataset
        args, runtime = parse([*run.flags, *more.split()])
        assert (args.seed, args.train_iters) == (run.seed, run.steps)
        assert args.global_batch_size * args.seq_length == run.tokens_per_step == 65536
        assert (args.lr, args.decoupled_lr) == RATES[name]
        assert (runtime is None) == run.uncompressed
        if runtime is not None:
            assert runtime.config.virtual_stages == 4
            assert len(runtime.plan.ranks) == 3
