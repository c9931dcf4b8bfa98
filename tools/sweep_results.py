# SPDX-License-Identifier: Apache-2.0
"""What the runs of a sweep came to, each against the uncompressed run of its length and seed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sweep_job import RunFolder
from sweep_list import SweepError
from sweep_traffic import TokenTraffic


@dataclass(frozen=True)
class Row:
    """A run, or the mean over the seeds of a setting.

    Attributes:
        seed: None for a mean.
        state: "finished", or why there are no figures.
        tokens: of the whole training.
        loss: validation loss of the evaluation at its end, nats a token.
        gap: how far above the loss of the uncompressed run of as many tokens and the same seed, in
            percent; None if that has not finished.
        loss_spread, gap_spread: half the range over the seeds, of a mean.
        traffic: None if unknown.
        seconds: of the steps' time.
        tokens_per_second: at the median step.
        curve: training loss by tokens.
        flags: of pretrain_gpt.py, as the list has them.
    """

    setting: str
    seed: int | None
    label: str
    group: str
    uncompressed: bool
    state: str
    tokens: int
    loss: float | None = None
    gap: float | None = None
    loss_spread: float | None = None
    gap_spread: float | None = None
    traffic: TokenTraffic | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """How many times fewer bytes cross than without compression, all bytes counted."""
        if self.uncompressed:
            return 1.0
        return None if self.traffic is None else self.traffic.ratio

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def collect(folders: Sequence[RunFolder]) -> list[Row]:
    """A row for each run.

    Raises:
        SweepError: a result is damaged.
    """
    rows = [_row(folder) for folder in folders]
    base = {(r.tokens, r.seed): r.loss for r in rows if r.uncompressed and r.loss is not None}
    known = next((row.traffic for row in rows if row.traffic is not None), None)
    return [_compared(row, base.get((row.tokens, row.seed)), known) for row in rows]


def _row(folder: RunFolder) -> Row:
    run = folder.run
    row = Row(
        run.setting, run.seed, run.label, run.group, run.uncompressed, "finished", run.tokens,
        flags=run.flags,
    )  # fmt: skip
    result = folder.result
    if result is None:
        state = f"crashed: {folder.failure}" if folder.failure is not None else "not started"
        if folder.failure is None and folder.begun:
            state = "not finished"
        return dataclasses.replace(row, state=state)
    try:
        traffic = result["traffic"]
        return dataclasses.replace(
            row,
            loss=result["validation"][-1][1],
            traffic=None if traffic is None else TokenTraffic(**traffic),
            seconds=result["seconds"],
            tokens_per_second=result["tokens_per_second"],
            curve=tuple((step * run.tokens_per_step, loss) for step, loss in result["losses"]),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise SweepError(
            f"{folder.path / 'result.json'} is not what this version writes ({error!r}); add "
            f"--redo {run.setting} to train it anew"
        ) from None


def _compared(row: Row, base: float | None, known: TokenTraffic | None) -> Row:
    """With its gap; an uncompressed run with the traffic that the others' reports count for it."""
    if row.loss is not None and base is not None:
        row = dataclasses.replace(row, gap=100 * (row.loss / base - 1))
    if row.uncompressed and row.loss is not None and known is not None:
        size = known.uncompressed
        row = dataclasses.replace(row, traffic=TokenTraffic(size, size, 0.0, size, 0, row.tokens))
    return row


def means(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting, in order; of one with several finished seeds, their mean."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, []).append(row)
    return [_mean(group) for group in settings.values()]


def _mean(rows: list[Row]) -> Row:
    done = [row for row in rows if row.loss is not None]
    if len(done) < 2:
        return (done or rows)[0]
    losses = [row.loss for row in done if row.loss is not None]
    gaps = [row.gap for row in done if row.gap is not None]
    speeds = [row.tokens_per_second for row in done if row.tokens_per_second is not None]
    return dataclasses.replace(
        done[0],
        seed=None,
        state=f"mean of {len(done)} seeds",
        loss=mean(losses),
        loss_spread=(max(losses) - min(losses)) / 2,
        gap=mean(gaps) if len(gaps) == len(done) else None,
        gap_spread=(max(gaps) - min(gaps)) / 2 if len(gaps) == len(done) else None,
        seconds=mean(row.seconds for row in done if row.seconds is not None),
        tokens_per_second=mean(speeds),
        curve=(),
    )


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats or equals in both ratio and gap, by rising ratio."""
    best: list[Row] = []
    lowest = float("inf")
    for row in sorted(rows, key=lambda r: (-_known(r.ratio), _known(r.gap))):
        if _known(row.gap) < lowest:
            lowest = _known(row.gap)
            best.append(row)
    return best[::-1]


def _known(value: float | None) -> float:
    assert value is not None, "rows on a front have a ratio and a gap"
    return value
