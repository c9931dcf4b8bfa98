# SPDX-License-Identifier: Apache-2.0
"""What settings lose: the measured rows of a sweep's results.json, for a plan's loss budget."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import plan_settings
from plan_settings import Setting
from sweep_list import flag_value
from sweep_results import Row, means


@dataclass(frozen=True)
class Gaps:
    """Settings of one model, all trained for as long.

    Attributes:
        settings: with their gaps, as trained.
        tokens: of each training.
        hidden_size: d of the model.
        stages: of its pipeline, virtual or real.
        shorter: how many rows of shorter trainings the file has besides.
        ignored: setting → why it cannot be carried over.
    """

    path: Path
    settings: tuple[Setting, ...]
    tokens: int
    hidden_size: int
    stages: int
    shorter: int
    ignored: dict[str, str]

    def carried_over(self, hidden_size: int) -> list[Setting]:
        """The settings for a model of another width, at the same r/d."""
        return [
            Setting(s.name, plan_settings.carried_over(s.flags, self.hidden_size, hidden_size),
                    s.gap)
            for s in self.settings
        ]  # fmt: skip


def read(path: Path) -> Gaps:
    """The finished rows of the longest trainings, means over seeds.

    Raises:
        ValueError: there is no such file, it is another one, or none of its rows has a gap.
    """
    try:
        rows = means([_row(entry) for entry in json.loads(path.read_text())])
    except OSError as error:
        raise ValueError(f"--gaps {path}: {error.strerror}; name a results.json of "
                         "tools/sweep.py") from None  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--gaps {path} is not what tools/sweep.py writes ({error!r}); make it anew with "
            "--report-only"
        ) from None
    known = [row for row in rows if row.gap is not None and not row.uncompressed]
    if not known:
        raise ValueError(
            f"--gaps {path} has no finished run with a gap to an uncompressed one; let the sweep "
            "finish"
        )
    tokens = max(row.tokens for row in known)
    longest = [row for row in known if row.tokens == tokens]
    sizes = {(_number(row, path, "--hidden-size"), _stages(row, path)) for row in longest}
    if len(sizes) > 1:
        raise ValueError(
            f"--gaps {path} has models of several sizes or pipelines (--hidden-size, stages: "
            f"{sorted(sizes)}); give a sweep of one"
        )
    ((hidden_size, stages),) = sizes
    settings, ignored = [], {}
    for row in longest:
        try:
            flags = plan_settings.read(row.flags)
            setting = Setting(row.setting, flags, row.gap)
            plan_settings.carried_over(flags, hidden_size, hidden_size)
            assert setting.config is not None, "compressed runs have --mapl-rank"
            settings.append(setting)
        except ValueError as error:
            ignored[row.setting] = str(error)
    return Gaps(path, tuple(settings), tokens, hidden_size, stages, len(known) - len(longest),
                ignored)  # fmt: skip


def _row(entry: dict[str, Any]) -> Row:
    """A row without its traffic and its curve."""
    names = {field.name for field in fields(Row)} - {"traffic", "curve"}
    values = {name: value for name, value in entry.items() if name in names}
    return Row(**{**values, "flags": tuple(entry["flags"])})


def _number(row: Row, path: Path, flag: str) -> int:
    value = flag_value(row.flags, flag)
    if value is None or not value.isdigit():
        raise ValueError(f"--gaps {path}: the flags of {row.setting} have no {flag}; make the file "
                         "anew with tools/sweep.py --report-only")  # fmt: skip
    return int(value)


def _stages(row: Row, path: Path) -> int:
    if flag_value(row.flags, "--mapl-virtual-stages") is not None:
        return _number(row, path, "--mapl-virtual-stages")
    return _number(row, path, "--pipeline-model-parallel-size")
