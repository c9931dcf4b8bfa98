# SPDX-License-Identifier: Apache-2.0
"""The list of a sweep: a TOML file of settings, read and checked before anything runs.

    save_interval = 200            # steps between checkpoints, from which a stopped run goes on
    keep_checkpoints = false       # of runs that are finished
    processes = 1                  # of each run; more are started with torchrun
    [model]
    flags = "--num-layers 12 ..."  # of Megatron, for all runs; so are those of
    [training]
    flags = "--train-iters 1600 ..."
    [data]                         # left out: those of a dataset of prepare_data.py
    flags = "--train-data-path {data}_train ..."
    [mapl]
    flags = "--mapl-virtual-stages 4"  # for the runs with --mapl-rank alone
    [[run]]
    name = "r96"                   # of its folder and in the tables
    flags = "--mapl-rank 96 ..."   # without --mapl-rank: the run that others are compared with
    seeds = [1234, 1235]           # a run for each; left out: one, with Megatron's own
    label = "r = d/8"              # in the pictures; left out: the name
    group = "rank"                 # settings of a group have one colour
    train_iters = 400              # in place of --train-iters

All but runs, with a name each, may be left out. Of a flag that stands there twice the last holds.
"""

import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from training_data import DATA_FLAGS, fill_in

#: Megatron's own.
SEED = 1234

_KEYS = {
    "save_interval",
    "keep_checkpoints",
    "processes",
    "model",
    "training",
    "data",
    "mapl",
    "run",
}
_RUN_KEYS = {"name", "flags", "seeds", "label", "group", "train_iters"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

#: Flags that the sweep gives itself, and what to do in their place.
_OWN = {
    "--save": "each run has its own folder",
    "--load": "each run has its own folder",
    "--save-interval": "set save_interval",
    "--save-retain-interval": "the last checkpoint alone is kept",
    "--mapl-report-dir": "each run has its own folder",
    "--exit-signal-handler": "the sweep gives it",
    "--seed": "set seeds",
    "--train-samples": "give --train-iters",
    "--eval-micro-batch-size": "bytes a token are told from payloads of one size",
    "--rampup-batch-size": "tokens are told from steps of one size",
    "--exit-interval": "stop the sweep with --seconds",
    "--exit-duration-in-mins": "stop the sweep with --seconds",
}


class SweepError(ValueError):
    """A list, or a folder of results, that cannot be worked with; says where, and what to do."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        setting: the name of its entry in the list.
        seed: of weights, data order and projectors.
        seeded: whether the list names seeds, which then are part of the folder's name.
        flags: of pretrain_gpt.py, all but those that the sweep gives itself.
        steps: of the whole training.
        tokens_per_step: tokens.
        label, group: for the pictures.
    """

    setting: str
    seed: int
    seeded: bool
    flags: tuple[str, ...]
    steps: int
    tokens_per_step: int
    label: str
    group: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.setting}-s{self.seed}" if self.seeded else self.setting

    @property
    def tokens(self) -> int:
        """Of the whole training."""
        return self.steps * self.tokens_per_step

    @property
    def uncompressed(self) -> bool:
        """Whether it is plain Megatron."""
        return flag_value(self.flags, "--mapl-rank") is None


@dataclass(frozen=True)
class SweepList:
    """All runs, in order, and what they have in common."""

    runs: tuple[Run, ...]
    save_interval: int
    keep_checkpoints: bool
    processes: int


def flag_value(flags: Sequence[str], flag: str) -> str | None:
    """The value of a flag, of the last one if it stands there twice; "" if it has none."""
    value = None
    for place, word in enumerate(flags):
        if word == flag:
            after = flags[place + 1] if place + 1 < len(flags) else "--"
            value = "" if after.startswith("--") else after
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
    return value


def read(path: Path, data: Path | None, *, to_run: bool = True) -> SweepList:
    """The list in a file.

    Args:
        data: the prefix of a dataset that prepare_data.py has made, for {data} and {cache}.
        to_run: whether the runs are to be started; if not, there need be no dataset.

    Raises:
        SweepError: the list is not one that can be run; names the file, the entry, the remedy.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror}; name a list such as those in "
                         "tools/sweeps") from None  # fmt: skip
    except tomllib.TOMLDecodeError as error:
        raise SweepError(f"{path} is not TOML: {error}; mend that line") from None
    return _Reader(path, data, to_run).read(content)


class _Reader:
    def __init__(self, path: Path, data: Path | None, to_run: bool) -> None:
        self._path, self._data, self._to_run = path, data, to_run

    def read(self, content: dict[str, Any]) -> SweepList:
        self._check_keys("the list", content, _KEYS)
        common = [
            word
            for table in ("model", "training", "data")
            for word in self._common_flags(table, content.get(table))
        ]
        compressed = self._common_flags("mapl", content.get("mapl"))
        entries = self._typed("the list", content, "run", list, [])
        if not entries:
            self._fail("the list", "it has no run; add a [[run]] with name and flags")
        runs = [run for number, entry in enumerate(entries, 1)
                for run in self._runs(number, entry, common, compressed)]  # fmt: skip
        self._check_names(runs)
        self._check_baselines(runs)
        return SweepList(
            runs=tuple(runs),
            save_interval=self._positive("the list", content, "save_interval", 200),
            keep_checkpoints=self._typed("the list", content, "keep_checkpoints", bool, False),
            processes=self._positive("the list", content, "processes", 1),
        )

    def _common_flags(self, table: str, content: Any) -> list[str]:
        where = f"[{table}]"
        if content is None:
            if table != "data":
                return []
            content = {"flags": DATA_FLAGS}
        if not isinstance(content, dict):
            self._fail(where, "it must be a table with flags in it")
        self._check_keys(where, content, {"flags"})
        return self._flags(where, content)

    def _runs(self, number: int, entry: Any, common: list[str], compressed: list[str]) -> list[Run]:
        where = f"[[run]] number {number}"
        if not isinstance(entry, dict):
            self._fail(where, "it must be a table with name and flags in it")
        name = self._typed(where, entry, "name", str, "")
        if not _NAME.fullmatch(name):
            self._fail(where, f"name = {name!r} is to name a folder; give it letters, digits, "
                              "and . _ + - inside")  # fmt: skip
        where = f'run "{name}"'
        self._check_keys(where, entry, _RUN_KEYS)
        own = self._flags(where, entry)
        if flag_value(own, "--train-iters") is not None:
            self._fail(where, "--train-iters stands among its flags; set train_iters there")
        if "train_iters" in entry:
            own += ["--train-iters", str(self._positive(where, entry, "train_iters", 1))]
        if flag_value(common, "--mapl-rank") is not None:
            self._fail("the list", "--mapl-rank stands among the flags of all runs, so that none "
                       "is uncompressed; put it into those of each [[run]]")  # fmt: skip
        compresses = flag_value(own, "--mapl-rank") is not None
        flags = [*common, *(compressed if compresses else []), *own]
        steps = self._number(where, flags, "--train-iters")
        tokens = self._number(where, flags, "--global-batch-size")
        tokens *= self._number(where, flags, "--seq-length")
        if flag_value(flags, "--eval-iters") == "0":
            self._fail(where, "--eval-iters 0 leaves it without a validation loss; give 1 or more")
        seeds = self._typed(where, entry, "seeds", list, [SEED])
        if not seeds or not all(type(seed) is int and seed > 0 for seed in seeds):
            self._fail(where, f"seeds = {seeds} must be a list of positive whole numbers")
        return [
            Run(
                setting=name,
                seed=seed,
                seeded="seeds" in entry,
                flags=(*flags, "--seed", str(seed)),
                steps=steps,
                tokens_per_step=tokens,
                label=self._typed(where, entry, "label", str, name),
                group=self._typed(where, entry, "group", str, ""),
            )
            for seed in seeds
        ]

    def _flags(self, where: str, table: dict[str, Any]) -> list[str]:
        text = self._typed(where, table, "flags", str, "")
        try:
            flags = shlex.split(text)
        except ValueError as error:
            self._fail(where, f"flags = {text!r}: {error}; mend the quotes")
        for flag, remedy in _OWN.items():
            if flag_value(flags, flag) is not None:
                self._fail(where, f"{flag} stands among the flags; leave it out: {remedy}")
        if ("{data}" not in text and "{cache}" not in text) or not self._to_run:
            return flags
        if self._data is None:
            self._fail(
                where,
                "{data} is the prefix of a dataset; give it with --data, or put flags "
                "without {data} into [data]",
            )
        try:
            filled = fill_in(flags, self._data)
        except FileNotFoundError as error:
            raise SweepError(
                f"--data {self._data}: there is no {error.filename}; make the dataset with "
                "tools/prepare_data.py --valid-fraction"
            ) from None
        model = Path(f"{self._data}.model")
        if "{data}.model" in flags and not model.exists():
            raise SweepError(
                f"--data {self._data}: there is no {model}; if the dataset was made with "
                "--tokenizer-model, copy that file there, or name it among flags of a [data] table"
            )
        return filled

    def _check_names(self, runs: Sequence[Run]) -> None:
        seen: dict[str, str] = {}
        for run in runs:
            if run.name in seen:
                self._fail(f'run "{run.setting}"', f'its folder {run.name} is that of run '
                           f'"{seen[run.name]}" too; give it another name or seed')  # fmt: skip
            seen[run.name] = run.setting

    def _check_baselines(self, runs: Sequence[Run]) -> None:
        plain: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for run in runs:
            if run.uncompressed:
                plain[run.tokens, run.seed].append(run)
        for run in runs:
            found = plain[run.tokens, run.seed]
            what = f"{run.tokens:,} tokens with seed {run.seed}"
            if not found:
                self._fail(f'run "{run.setting}"', f"there is no uncompressed run of {what} to "
                           "compare it with; add one without --mapl-rank, or its seed to "
                           "one")  # fmt: skip
            if len(found) > 1:
                names = " and ".join(f'"{other.setting}"' for other in found)
                self._fail(f"runs {names}", f"all are uncompressed, of {what}; leave one of them, "
                           "or add --mapl-rank to the others")  # fmt: skip

    def _check_keys(self, where: str, table: dict[str, Any], known: set[str]) -> None:
        for key in table:
            if key not in known:
                self._fail(where, f"{key!r} is unknown there; use {', '.join(sorted(known))}")

    def _typed[T](
        self, where: str, table: dict[str, Any], key: str, kind: type[T], default: T
    ) -> T:
        value = table.get(key, default)
        if type(value) is not kind:
            self._fail(where, f"{key} = {value!r} must be a {kind.__name__}")
        return value

    def _positive(self, where: str, table: dict[str, Any], key: str, default: int) -> int:
        value = self._typed(where, table, key, int, default)
        if value < 1:
            self._fail(where, f"{key} = {value} must be at least 1")
        return value

    def _number(self, where: str, flags: Sequence[str], flag: str) -> int:
        value = flag_value(flags, flag)
        if value is None:
            self._fail(where, f"its flags have no {flag}, nor have [model] and [training]; add it")
        if not value.isdigit() or not int(value):
            self._fail(where, f"{flag} {value} must be a positive whole number")
        return int(value)

    def _fail(self, where: str, fault: str) -> NoReturn:
        raise SweepError(f"{self._path}: {where}: {fault}")
