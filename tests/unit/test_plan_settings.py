# SPDX-License-Identifier: Apache-2.0
"""Settings and their gaps, read from flags and from files of sweeps."""

import json
from pathlib import Path
from typing import Any

import pytest

import plan_gaps
import plan_settings
from sweep_results import Row


def test_settings_keep_their_share_of_the_width() -> None:
    flags = plan_settings.read(
        "--mapl-rank 248 --mapl-anchor-rank 384 --mapl-log-interval 5".split()
    )
    assert plan_settings.carried_over(flags, 768, 768) == flags == {
        "rank": [248], "anchor_rank": 384
    }  # fmt: skip
    assert plan_settings.carried_over(flags, 768, 4096) == {"rank": [1328], "anchor_rank": 2048}
    codebooks = plan_settings.read("--mapl-rank 96 --mapl-rvq-groups 8".split())
    assert plan_settings.carried_over(codebooks, 768, 1024) == {"rank": [144], "rvq_groups": 12}
    whole = plan_settings.read("--mapl-rank 768 --mapl-projector none".split())
    assert plan_settings.carried_over(whole, 768, 1000)["rank"] == [1000]
    with pytest.raises(ValueError, match="a rank for each boundary"):
        plan_settings.carried_over({"rank": [8, 0, 8]}, 768, 1024)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mapl-rnak 8 --mapl-rank 8", "--mapl-rnak 8: this version has no such setting"),
        ("--mapl-rank eight", "--mapl-rank eight: this version has no such value"),
        ("--mapl-rank 8 --mapl-forward-codec int7", "--mapl-forward-codec int7: this version"),
        ("--mapl-rank 8 --mapl-topk 3 4", "--mapl-topk 3 4: it takes one value"),
    ],
)
def test_flags_that_there_are_not(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_settings.read(flags.split())


def results(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    """A results.json with these rows, beside an uncompressed one."""
    path = tmp_path / "results.json"
    common = "--hidden-size 64 --mapl-virtual-stages 4"
    entries = []
    for changes in ({"setting": "plain", "uncompressed": True, "gap": 0.0}, *rows):
        own = {"setting": "s", "mapl": "--mapl-rank 8", "seed": 1, "uncompressed": False,
               "state": "finished", "tokens": 100, "loss": 2.0, "gap": 1.0,
               "seconds": 9.0, "tokens_per_second": 5.0, **changes}  # fmt: skip
        flags = f"{common} {own.pop('mapl')}".split()
        row = Row(label="", group="", flags=tuple(flags), **own)
        entries.append(row.to_json())
    path.write_text(json.dumps(entries))
    return path


def test_gaps_of_a_sweep(tmp_path: Path) -> None:
    path = results(
        tmp_path,
        {"setting": "two seeds", "gap": 1.0, "seed": 1},
        {"setting": "two seeds", "gap": 3.0, "seed": 2},
        {"setting": "short", "gap": 0.5, "tokens": 50},
        {"setting": "crashed", "gap": None, "loss": None},
        {"setting": "other ranks", "mapl": "--mapl-rank 8 0 8"},
    )
    gaps = plan_gaps.read(path)
    assert [(s.name, s.gap) for s in gaps.settings] == [("two seeds", 2.0)]
    assert (gaps.tokens, gaps.hidden_size, gaps.stages, gaps.shorter) == (100, 64, 4, 1)
    assert list(gaps.ignored) == ["other ranks"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; name a results.json"),
        ("{", "is not what tools/sweep.py writes"),
        ('[{"setting": "old"}]', "is not what tools/sweep.py writes .*make it anew"),
        ("[]", "no finished run with a gap"),
    ],
)
def test_files_without_gaps(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "gaps.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--gaps {path}.*{message}"):
        plan_gaps.read(path)
